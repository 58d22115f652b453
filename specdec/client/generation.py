"""What a client asks for and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.output_format import OutputFormat
from specdec.contract.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    """The turn's text."""


Prompt = str | Sequence[Message | Mapping[str, str]] | Sequence[int]
"""A string (one user turn, or raw text with `GenerateOptions.raw`), a conversation, or token ids. Turns of a
conversation are messages, or dicts of "role" and "content"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Everything a request may say besides its prompt."""

    method: str = ""
    """Drafter to use, several joined by "+", "none" for plain decoding, "auto" for what pays best round by
    round; empty: the gateway's default."""
    draft_depth: int | None = None
    """Tokens to draft per round in a row (K); None: the gateway chooses round by round, by what pays."""
    draft_nodes: int = 0
    """Most tokens of a round's draft tree, all branches and drafters together; 0: with a
    `draft_depth` each drafter drafts a chain, without one the gateway chooses."""
    min_draft_confidence: float = 0.0
    """End a round's draft before the first token the drafter gives less than this probability; 0: off."""
    max_new_tokens: int | None = None
    """Most tokens to emit; None: the gateway's default."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the target picks tokens; greedy unless told otherwise."""
    output_format: OutputFormat | None = None
    """Which texts the answer may be, such as JSON of a schema; None: any."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation; the text stops before the first."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the generation, besides the model's own."""
    ignore_eos: bool = False
    """Do not end at the model's own end tokens."""
    num_top_logprobs: int | None = None
    """Most probable tokens to report per emitted token, 0 to 20; None: no log probabilities at all."""
    cache_salt: str = ""
    """Separates what the services remember: nothing learnt from this request is used for one with another
    salt."""
    request_id: str = ""
    """Name of the request in logs, spans and errors, 1 to 128 printable ASCII characters; empty: the gateway
    makes one."""
    raw: bool = False
    """Tokenise a string prompt as it is, without the chat template."""


DEFAULT_OPTIONS = GenerateOptions()
"""The gateway's defaults throughout."""


def with_keywords(
    options: GenerateOptions,
    method: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: str | Sequence[str] | None,
) -> GenerateOptions:
    """Return the options with the fields replaced that have a value here; None leaves a field as it is.

    Raises:
        InvalidArgumentError: a value is of a wrong type, for which it cannot be put into the options.
    """
    if not isinstance(options, GenerateOptions):
        raise InvalidArgumentError(
            f"options is {options!r}; pass GenerateOptions(...), or keywords.", field="options"
        )
    if not isinstance(options.sampling, SamplingParams):
        raise InvalidArgumentError(
            f"sampling is {options.sampling!r}; pass SamplingParams(...).", field="sampling"
        )
    if not isinstance(stop, Sequence | None):
        raise InvalidArgumentError(f"stop is {stop!r}; pass a string or a tuple of strings.", field="stop")
    strings = (stop,) if isinstance(stop, str) else None if stop is None else tuple(stop)
    sampling = _given(temperature=temperature, top_p=top_p, seed=seed)
    changes = _given(method=method, max_new_tokens=max_new_tokens, stop=strings)
    return replace(options, **changes, sampling=replace(options.sampling, **sampling))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Token:
    """One emitted token."""

    token_id: int
    """Token id in the target's vocabulary."""
    text: str
    """Text the token completes; the tokens' texts join to the answer. Often empty."""
    is_draft: bool
    """Drafted and accepted, rather than added by the target."""
    logprob: float | None = None
    """Natural log probability under the target's unprocessed distribution; None: not asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Most probable (token id, log probability) pairs, best first."""


@dataclass(frozen=True, slots=True)
class Started:
    """The gateway's acceptance of a request."""

    input_tokens: int
    """Tokens of the prompt after tokenisation."""
    method: str
    """Method in effect."""
    draft_depth: int
    """Draft tokens asked for per round (K); of the first round where the gateway chooses."""
    trace_id: str
    """Trace id, 32 hex digits; empty: not traced."""
    model_id: str
    """Model that answers."""
    draft_nodes: int = 0
    """Most tokens of a round's draft tree; 0: drafts are chains."""
    request_id: str = ""
    """Name of the request in logs, spans and errors."""
    seed: int | None = None
    """Seed in effect, drawn by the gateway if the request has none; None: the answer is greedy."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts."""

    input_tokens: int
    """Tokens of the prompt."""
    output_tokens: int
    """Tokens emitted, end token included."""
    reused_input_tokens: int = 0
    """Tokens of the prompt that needed no pass of the target, because an earlier request began with them."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Times measured at the gateway from the request's arrival, milliseconds."""

    ttft_ms: float
    """To the first token."""
    tpot_ms: float
    """Mean per output token after the first; 0: fewer than two tokens."""
    total_ms: float
    """To the last token."""
    waiting_ms: float = 0.0
    """Until there was room to run; a part of the time to the first token."""


@dataclass(frozen=True, slots=True)
class ProposerStats:
    """What one of several drafters contributed to a generation."""

    drafter: str
    """Its name."""
    num_draft_tokens: int
    """Draft tokens it proposed that were verified."""
    num_accepted_tokens: int
    """Accepted draft tokens that it proposed, alone or with others."""
    num_sole_accepted_tokens: int
    """Accepted draft tokens that it alone proposed."""
    num_fallback_rounds: int = 0
    """Rounds it was left out of because it was lost, late, refused or never right."""
    fallback_reason: str = ""
    """The commonest reason, and that it is never right, if so; empty: neither."""


@dataclass(frozen=True, slots=True)
class MethodRounds:
    """How often a method drafted for an answer whose rounds chose their method."""

    method: str
    """The method; "none": the rounds had no draft."""
    num_rounds: int
    """Number of rounds."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """What the rounds of a generation did; the times are sums over rounds, milliseconds."""

    method: str
    """Method in effect."""
    num_rounds: int
    """Verify passes after the prefill."""
    num_draft_tokens: int
    """Draft tokens verified, all branches of trees."""
    num_accepted_tokens: int
    """Draft tokens accepted, bonus excluded."""
    acceptance_histogram: tuple[int, ...] = ()
    """Entry i: rounds that accepted exactly i draft tokens."""
    num_draft_tokens_per_position: tuple[int, ...] = ()
    """Entry i: rounds that drafted a token at position i, in a tree at depth i + 1."""
    num_accepted_tokens_per_position: tuple[int, ...] = ()
    """Entry i: rounds in which a draft token at position i was accepted."""
    draft_ms: float = 0.0
    """The drafter's time."""
    verify_ms: float = 0.0
    """The verifier's time."""
    transport_ms: float = 0.0
    """Time on the wire and in gRPC to both services."""
    gateway_ms: float = 0.0
    """The gateway's own time."""
    num_fallback_rounds: int = 0
    """Rounds that went without a draft because the drafter was lost, late, refused or never right."""
    fallback_reason: str = ""
    """The commonest reason, and that the drafter is never right, if so; empty: neither."""
    proposers: tuple[ProposerStats, ...] = ()
    """What each of several drafters contributed; empty: there was one, or none."""
    methods: tuple[MethodRounds, ...] = ()
    """How often each method drafted, the most frequent first; empty: the method is not "auto"."""

    @property
    def draft_tokens_per_token(self) -> float:
        """Draft tokens verified per token committed after the first; 0 without rounds."""
        num_tokens = self.num_accepted_tokens + self.num_rounds
        return self.num_draft_tokens / num_tokens if num_tokens else 0.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Entry i: of the rounds that drafted a token at position i, the share that accepted one."""
        accepted, drafted = self.num_accepted_tokens_per_position, self.num_draft_tokens_per_position
        return tuple(hits / tries for hits, tries in zip(accepted, drafted, strict=True))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens committed per round, bonus included; 1 without rounds, which is what plain decoding has."""
        return 1.0 + (self.num_accepted_tokens / self.num_rounds if self.num_rounds else 0.0)


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    """The answer."""
    tokens: tuple[Token, ...] = field(repr=False)
    """The emitted tokens, end token included."""
    finish_reason: str
    """"stop_token", "length" or "stop_string"."""
    usage: Usage
    timing: Timing
    speculation: Speculation
    trace_id: str
    """Trace id, 32 hex digits; empty: not traced."""
    model_id: str
    """Model that answered."""
    num_failovers: int = 0
    """Times a verifier was lost and the answer went on with another."""
    request_id: str = ""
    """Name of the request in logs, spans and errors."""
    seed: int | None = None
    """Seed in effect; None: the answer is greedy."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the emitted tokens."""
        return tuple(token.token_id for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the answer as `specdec generate --json` prints it.

        `logprobs` is there if asked for; the number and the reason of fallback rounds if there were any;
        `proposers` if several drafters were asked.
        """
        document: dict[str, Any] = {"text": self.text, "token_ids": list(self.token_ids)}
        document |= _plain(asdict(replace(self, tokens=())))
        del document["tokens"]
        derived = {name: getattr(self.speculation, name) for name in _DERIVED}
        speculation = document["speculation"] | _plain(derived)
        for name in _SHOWN_IF_SET:
            if not speculation[name]:
                del speculation[name]
        document["speculation"] = speculation
        if any(token.logprob is not None for token in self.tokens):
            document["logprobs"] = [
                {"logprob": token.logprob, "top": _plain(token.top_logprobs)} for token in self.tokens
            ]
        return document


_DERIVED = ("mean_acceptance_length", "acceptance_by_depth", "draft_tokens_per_token")
"""Properties of `Speculation` that its JSON shows beside its fields."""
_SHOWN_IF_SET = ("num_fallback_rounds", "fallback_reason", "proposers", "methods")
"""Fields of `Speculation` that its JSON leaves out where they say nothing."""


def _plain(value: Any) -> Any:
    """Convert a value to what JSON has: lists in place of tuples."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
