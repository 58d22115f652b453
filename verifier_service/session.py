"""The state of one session: the committed tokens, and how many of them the KV pool holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import (
    SESSION_PREEMPTED,
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from specdec.contract.output_format import OutputFormat
from specdec.contract.request_limits import validate_max_new_tokens
from specdec.contract.retry import Progress
from specdec.contract.sampling import SamplingParams, validate_num_top_logprobs, validate_token_ids
from specdec.contract.target_state import TargetStateSpec
from specdec.runtime.kv_slots import KvAllocation
from specdec.runtime.picks import PickContext
from specdec.runtime.prefix_cache import PrefixKeys
from verifier_service.acceptance import DraftAcceptance, FinishReason
from verifier_service.guide import Guide
from verifier_service.state_stream import ExportedState


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """The parameters that open a session; see specdec.v1.VerifyOpen."""

    committed_token_ids: tuple[int, ...]
    """The prompt, then the output of an earlier session that was lost."""
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    prompt_length: int = 0
    """How many of committed_token_ids belong to the prompt; 0: all of them."""
    num_top_logprobs: int | None = None
    target_state_specs: tuple[TargetStateSpec, ...] = ()
    """What each of the session's drafters needs of the target's state."""
    draft_nodes: int = 0
    """Most nodes that the draft tree of a round will have."""
    output_format: OutputFormat | None = None
    """Which texts the answer may be; None: any."""
    owner: tuple[str, ...] = ()
    """Whose text it is; the state of one owner's text is never used for another's."""

    def validate(self, vocab_size: int, model_max_length: int) -> int:
        """Check all values, and return the most tokens that the session can reach.

        Args:
            vocab_size: number of tokens in the model's vocabulary.
            model_max_length: length of the model's context, tokens; 0: there is no limit.

        Raises:
            InvalidArgumentError: a value is out of range.
        """
        num_committed = len(self.committed_token_ids)
        if not num_committed:
            raise InvalidArgumentError(
                "The prompt is empty; send at least one token.", field="prompt", reason="EMPTY_PROMPT"
            )
        if model_max_length and num_committed >= model_max_length:
            raise InvalidArgumentError(
                f"The prompt has {num_committed} tokens, but the model's context is {model_max_length}; "
                "shorten the prompt so that at least one token fits after it.",
                field="prompt",
                reason="PROMPT_TOO_LONG",
            )
        validate_max_new_tokens(self.max_new_tokens)
        if self.prompt_length > num_committed:
            raise InvalidArgumentError(
                f"prompt_length is {self.prompt_length}; it must be at most {num_committed}, the number of "
                "committed tokens.",
                field="prompt_length",
            )
        self.sampling.validate(vocab_size)
        if self.output_format:
            self.output_format.validate_beside(self.sampling, ignore_eos=self.ignore_eos)
        validate_num_top_logprobs(self.num_top_logprobs)
        validate_token_ids("committed_token_ids", self.committed_token_ids, vocab_size)
        validate_token_ids("stop_token_ids", tuple(self.stop_token_ids), vocab_size)
        max_length = num_committed + self.max_new_tokens
        return min(max_length, model_max_length) if model_max_length else max_length

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """The committed tokens that are not the prompt's."""
        return self.committed_token_ids[self.prompt_length or len(self.committed_token_ids) :]


class Session:
    """The state of one session. At every step 0 <= cached_length < committed_length <= max_length.

    Args:
        request: the parameters, already validated.
        stop_token_ids: every token that ends the generation, including the model's own end tokens.
        allocation: KV slots of the committed tokens, and of some more.
        prefix_keys: keys of the blocks of its text.
        max_length: most tokens that the session may hold, prompt included.
        room: most KV slots that it may take: for `max_length` tokens, and for nodes of a draft tree.
        guide: follows the answer's format, on the engine's thread; None: the answer has none.
    """

    def __init__(
        self,
        request: OpenRequest,
        *,
        stop_token_ids: frozenset[int],
        allocation: KvAllocation,
        prefix_keys: PrefixKeys,
        max_length: int,
        room: int = 0,
        guide: Guide | None = None,
    ) -> None:
        self.state: ExportedState | None = None
        """The target state that the session exports; None: it exports no state."""
        self.state_refusals: tuple[str, ...] = ()
        """For each of the request's specs, why the session does not export it; empty: it does."""
        self.sampling = request.sampling
        self.num_top_logprobs = request.num_top_logprobs
        self.stop_token_ids = stop_token_ids
        self.guide = guide
        self.allocation = allocation
        self.max_length = max_length
        self._room = max(max_length, room)
        self.is_preempted = False
        """Whether its KV went to an older session, or goes when its pass is over."""
        self.is_in_pass = False
        """Whether a pass reads and writes its KV, or is about to."""
        self.prompt_length = request.prompt_length or len(request.committed_token_ids)
        self.token_ids = list(request.committed_token_ids)
        self._num_given = len(self.token_ids)
        self._opened_at = time.monotonic()
        self.prefix_keys = prefix_keys
        self.cached_length = 0
        self.finish_reason: FinishReason | None = None

    @property
    def committed_length(self) -> int:
        """The number of final tokens, prompt included."""
        return len(self.token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """The number of tokens that may still be committed."""
        return self.max_length - self.committed_length

    @property
    def progress(self) -> Progress:
        """How far the session has come; its room is that of the KV pool, tokens."""
        return Progress(
            begun_at=self._opened_at,
            num_done=self.committed_length - self._num_given,
            num_left=0 if self.finish_reason else self.num_remaining_tokens,
            room=self.allocation.capacity,
        )

    @property
    def num_reused_tokens(self) -> int:
        """The number of tokens whose state was there before the session."""
        return self.allocation.shared_length

    @property
    def hidden_names(self) -> frozenset[str]:
        """The hidden states that passes keep for the session."""
        return self.state.hidden_names if self.state else frozenset()

    @property
    def num_free_slots(self) -> int:
        """The number of slots behind the anchor's slot, which a draft can use."""
        return self.allocation.capacity - self.committed_length

    @property
    def most_free_slots(self) -> int:
        """The same, once the session has taken all the slots that it may."""
        return max(self.allocation.capacity, self._room) - self.committed_length

    @property
    def may_grow(self) -> bool:
        """Whether the session's tokens may outgrow the slots that it has."""
        return not self.finish_reason and self.allocation.capacity < self.max_length

    def use(self, allocation: KvAllocation) -> None:
        """Take an allocation that has all that the session still reads, in the place of its own."""
        self.allocation = allocation
        if self.state:
            self.state.allocation = allocation

    def pick_context(self, draft: DraftTree, mask: Tensor | None = None) -> PickContext:
        """Return the values on which the target's picks after the committed tokens depend.

        Args:
            mask: what the answer's format allows, see PickContext.
        """
        return PickContext(self.sampling, self.token_ids, self.prompt_length, draft, mask)

    def check_preempted(self) -> None:
        """Refuse to go on without KV.

        Raises:
            AbortedError: the session has been preempted.
        """
        if self.is_preempted:
            raise AbortedError(
                "The session was preempted: an older one needed its KV. Open it again with the tokens "
                "committed so far, here or elsewhere.",
                reason=SESSION_PREEMPTED,
            )

    def check_round(self, base_committed_length: int) -> None:
        """Refuse a round that does not continue the state of the session.

        Raises:
            AbortedError: the session has been preempted.
            FailedPreconditionError: the session has finished, or the base is not its committed length.
        """
        if self.finish_reason:
            raise FailedPreconditionError(
                f"The session has finished ({self.finish_reason.value}); open a new session.",
                reason="SESSION_FINISHED",
            )
        self.check_preempted()
        if base_committed_length != self.committed_length:
            raise FailedPreconditionError(
                f"base_committed_length is {base_committed_length}, but the session has committed "
                f"{self.committed_length} tokens; nothing was changed. Send the round with that length.",
                reason="STALE_BASE",
            )

    def commit(self, draft: DraftTree, acceptance: DraftAcceptance) -> None:
        """Make a round's tokens final. The KV past cached_length, of refused tokens, is forgotten."""
        # The pass wrote KV for the anchor and the draft. The KV of accepted tokens is final and in its place.
        self.cached_length = self.committed_length + acceptance.num_accepted_tokens
        self.token_ids.extend(draft.token_ids[index] for index in acceptance.path)
        self.token_ids.append(acceptance.bonus_token_id)
        self.finish_reason = acceptance.finish_reason
        self._assert_invariants()
        if self.state:
            self.state.advance(self.cached_length)

    def _assert_invariants(self) -> None:
        assert 0 <= self.cached_length < self.committed_length <= self.max_length
        assert self.cached_length == self.committed_length - 1
        assert self.cached_length <= self.allocation.capacity
