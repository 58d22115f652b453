"""What a request asks for, checked and settled: the gateway reads its message here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.request.backends import Backends
from gateway.request.drafts import DraftPlan, plan_drafts
from gateway.request.prompt import require_shorter, tokenise
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.output_format import OutputFormat
from specdec.contract.request_limits import (
    MAX_MESSAGES,
    MAX_STOP_TOKEN_IDS,
    validate_cache_key,
    validate_length,
    validate_max_new_tokens,
    validate_stop_strings,
)
from specdec.contract.sampling import (
    SamplingParams,
    validate_num_top_logprobs,
    validate_probability,
    validate_token_ids,
    with_seed,
)
from specdec.v1 import gateway_pb2, verifier_pb2


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose values were checked, as far as the gateway can."""

    prompt_token_ids: list[int]
    max_new_tokens: int
    drafting: DraftPlan
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the target picks. Above temperature 0 the seed is settled."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_top_logprobs: int | None = None
    min_draft_confidence: float = 0.0
    cache_salt: str = ""
    output_format: OutputFormat | None = None
    """Which texts the answer may be; None: any."""
    continues_text: bool = False
    """Whether the prompt is raw text, so that the answer goes on where it ends."""

    @property
    def method(self) -> str:
        """Method in effect."""
        return self.drafting.method


async def make_plan(
    request: gateway_pb2.GenerateRequest,
    backends: Backends,
    verifier: verifier_pb2.VerifierServiceGetInfoResponse,
    *,
    max_new_tokens: int,
) -> Plan:
    """Tokenise the prompt and settle seed, method, K and how many tokens there is room for.

    Args:
        verifier: the limits of the verifier that will run it.
        max_new_tokens: most tokens that the caller wants and may have.

    Raises:
        FailedPreconditionError: the request has an output format, and the verifier takes none.
        InvalidArgumentError: a value is wrong; the error names its field.
    """
    validate_max_new_tokens(max_new_tokens)
    validate_cache_key("cache_salt", request.cache_salt)
    num_top_logprobs = request.num_top_logprobs if request.HasField("num_top_logprobs") else None
    validate_num_top_logprobs(num_top_logprobs)
    validate_stop_strings(request.stop_strings)
    validate_length("stop_token_ids", len(request.stop_token_ids), MAX_STOP_TOKEN_IDS)
    validate_length("chat.messages", len(request.chat.messages), MAX_MESSAGES)
    validate_probability("min_draft_confidence", request.min_draft_confidence)
    sampling = _settle_sampling(request, verifier.model.vocab_size)
    output_format = _output_format(request, sampling)
    require_formats(output_format, verifier)
    drafting = plan_drafts(request, backends, verifier)
    context = verifier.model.max_length
    token_ids = await tokenise(request, backends, context)
    if not token_ids:
        raise InvalidArgumentError("The prompt is empty.", field="prompt", reason="EMPTY_PROMPT")
    validate_token_ids("token_ids", token_ids, verifier.model.vocab_size)
    # Special tokens have no text in which a stop string could be found.
    stops = [backends.codec.special_token(text) for text in request.stop_strings]
    special_stops = [token_id for token_id in stops if token_id is not None]
    if context:
        require_shorter(len(token_ids), context)
        max_new_tokens = min(max_new_tokens, context - len(token_ids))
    return Plan(
        token_ids,
        max_new_tokens,
        drafting,
        sampling=sampling,
        stop_strings=tuple(request.stop_strings),
        stop_token_ids=(*request.stop_token_ids, *special_stops),
        ignore_eos=request.ignore_eos,
        num_top_logprobs=num_top_logprobs,
        min_draft_confidence=request.min_draft_confidence,
        cache_salt=request.cache_salt,
        output_format=output_format,
        continues_text=request.WhichOneof("prompt") == "text",
    )


def _output_format(request: gateway_pb2.GenerateRequest, sampling: SamplingParams) -> OutputFormat | None:
    """Return the request's format; None: it has none. The verifier says whether it can be followed."""
    output_format = OutputFormat.of_request(request)
    if output_format:
        output_format.validate_beside(sampling, ignore_eos=request.ignore_eos)
    return output_format


def require_formats(
    output_format: OutputFormat | None, verifier: verifier_pb2.VerifierServiceGetInfoResponse
) -> None:
    """Refuse an output format that a verifier would not follow; None: there is none.

    Raises:
        FailedPreconditionError: the verifier takes no formats.
    """
    if output_format and not verifier.takes_output_formats:
        raise FailedPreconditionError(
            "The verifier takes no output format: its model has no tokenizer.json or no end token, or the "
            "verifier is of an earlier version.",
            reason="NO_OUTPUT_FORMATS",
        )


def _settle_sampling(request: gateway_pb2.GenerateRequest, vocab_size: int) -> SamplingParams:
    """Return the request's parameters, with a seed wherever picks are random."""
    sampling = SamplingParams.from_proto(request.sampling)
    sampling.validate(vocab_size)
    return with_seed(sampling)
