"""An independent draft model: any causal LM with the target's vocabulary, with its own KV.

It picks with the target's parameters, seed and positions, so that at temperature > 0 both meet the same
Gumbel noise (Daliri, Musco, Suresh 2024) and agree often.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem, DraftSession, OpenDraft
from specdec.contract.sampling import validate_token_ids
from specdec.runtime.attention import Segment
from specdec.runtime.kv_slots import KvAllocation
from specdec.runtime.loading import LoadedModel
from specdec.runtime.memory import dtype_name
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.picks import PickContext, Picker

DEFAULT_DRAFT_DEPTH = 4


class CausalLmSession(DraftSession):
    """Committed tokens, and the tokens that the draft model's KV was made from.

    Args:
        context_length: positions the draft model can use; past them the session goes on without drafts.
    """

    def __init__(self, request: OpenDraft, allocation: KvAllocation, context_length: int) -> None:
        super().__init__(request)
        self.allocation = allocation
        self.context_length = context_length
        self.cached_token_ids: list[int] = []

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens of the drafter's own KV that are reserved for the session."""
        return self.allocation.capacity

    @property
    def num_prefill_tokens(self) -> int:
        """Number of committed tokens without KV; the last is left out, since every draft starts from it."""
        return max(0, min(len(self.token_ids) - 1, self.context_length) - len(self.cached_token_ids))

    def commit(self, committed_token_ids: Sequence[int], committed_length: int) -> None:
        """Append the target's tokens and forget the KV of draft tokens that were refused."""
        super().commit(committed_token_ids, committed_length)
        first_draft = len(self.token_ids) - len(committed_token_ids)
        cached, wanted = self.cached_token_ids[first_draft:], self.token_ids[first_draft:]
        num_right = next(
            (i for i, (a, b) in enumerate(zip(cached, wanted, strict=False)) if a != b),
            min(len(cached), len(wanted)),
        )
        # The last token is never kept: the next draft needs its logits.
        del self.cached_token_ids[min(first_draft + num_right, len(self.token_ids) - 1) :]

    def segment(self, token_ids: Sequence[int], num_logits: int) -> Segment:
        """Return the part of a pass that runs `token_ids` after what is cached; the pass caches them."""
        segment = Segment(self.allocation, len(self.cached_token_ids), token_ids, num_logits)
        self.cached_token_ids.extend(token_ids)
        return segment


class CausalLmDrafter(Drafter):
    """Drafts token by token with a small model; each draft step is one pass for all sessions."""

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        *,
        kv_budget_bytes: int,
        max_draft_depth: int,
    ) -> None:
        self._packed = PackedModel(loaded.model, kv_budget_bytes=kv_budget_bytes)
        self.kv_pool = self._packed.pool
        self._picker = Picker(self._packed.vocab_size, self._packed.device)
        self.traits = DrafterTraits(
            name=name,
            family="causal-lm",
            max_draft_depth=max_draft_depth,
            default_draft_depth=min(DEFAULT_DRAFT_DEPTH, max_draft_depth),
            model_id=loaded.model_id,
            revision=loaded.revision,
            vocabulary_fingerprint=loaded.vocabulary_fingerprint,
            vocab_size=self._packed.vocab_size,
            max_length=self._packed.max_length,
            dtype=dtype_name(loaded.model.dtype),
            device=str(self._packed.device),
            model_impl=self._packed.model_impl,
        )

    def open(self, request: OpenDraft) -> CausalLmSession:
        """Open a session and reserve KV for the whole generation.

        Raises:
            InvalidArgumentError: the generation is longer than the pool, or uses tokens the model lacks.
            ResourceExhaustedError: all KV is in use.
        """
        validate_token_ids("committed_token_ids", request.committed_token_ids, self._packed.vocab_size)
        context_length = min(request.max_length, self._packed.max_length or request.max_length)
        return CausalLmSession(request, self._packed.pool.allocate(context_length), context_length)

    def close(self, session: DraftSession) -> None:
        """Give the session's KV back."""
        self._packed.pool.free(_checked(session).allocation)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        """Catch up with the committed tokens, then draft K tokens one after the other."""
        sessions = [_checked(item.session) for item in items]
        wanted = [_num_to_draft(item) for item in items]
        drafts: list[list[int]] = [[] for _ in items]
        segments = [
            _catch_up(session, item.num_tokens, bool(count))
            for session, item, count in zip(sessions, items, wanted, strict=True)
        ]
        running = [index for index, segment in enumerate(segments) if segment.token_ids]
        while running:
            logits = self._packed.forward([segments[index] for index in running])
            drafting = [index for index in running if len(drafts[index]) < wanted[index]]
            self._pick(drafting, [rows for rows in logits if len(rows)], sessions, drafts)
            # A draft's last token needs no pass: nothing is drafted after it.
            running = [index for index in drafting if len(drafts[index]) < wanted[index]]
            for index in running:
                segments[index] = sessions[index].segment(drafts[index][-1:], num_logits=1)
        return drafts

    def _pick(
        self,
        drafting: Sequence[int],
        logits: Sequence[Tensor],
        sessions: Sequence[CausalLmSession],
        drafts: Sequence[list[int]],
    ) -> None:
        """Append one pick to each draft."""
        contexts = [
            PickContext(
                sessions[index].sampling,
                [*sessions[index].token_ids, *drafts[index]],
                sessions[index].prompt_length,
            )
            for index in drafting
        ]
        for index, picks in zip(drafting, self._picker.pick(logits, contexts), strict=True):
            drafts[index].append(picks[0])


def _num_to_draft(item: DraftItem) -> int:
    """Return K, or less where the generation or the model's context ends sooner."""
    session = _checked(item.session)
    return max(0, min(item.draft_depth, session.context_length - len(session.token_ids)))


def _catch_up(session: CausalLmSession, num_tokens: int, is_drafting: bool) -> Segment:
    """Run the committed tokens without KV: all of them for a draft, a chunk for a prefill."""
    first = len(session.cached_token_ids)
    num_tokens = (
        session.num_prefill_tokens + 1 if is_drafting else min(num_tokens, session.num_prefill_tokens)
    )
    last = first + num_tokens
    return session.segment(session.token_ids[first:last], num_logits=int(is_drafting))


def _checked(session: DraftSession) -> CausalLmSession:
    assert isinstance(session, CausalLmSession)
    return session
