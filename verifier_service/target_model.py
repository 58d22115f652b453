"""The target model: one `step` processes a list of work items, prefill chunks and verify rounds together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.contract.draft_tree import NO_DRAFT, DraftTree
from specdec.contract.errors import InternalError, SpecdecError, log_defect
from specdec.runtime.attention import Segment
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.picks import Picker, top_logprobs
from verifier_service.acceptance import DraftAcceptance, accept
from verifier_service.masks import MaskBuffers
from verifier_service.session import Session

logger = logging.getLogger(__name__)

TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""The log probability of an emitted token, and the most probable (token id, log probability) pairs."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Part of a session's prompt: the tokens from `start` to `stop`. The last chunk picks the first token."""

    session: Session
    start: int
    stop: int
    is_urgent: bool = False

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the chunk adds to a pass."""
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        """Whether the chunk ends the prompt."""
        return self.stop == self.session.committed_length

    def segment(self) -> Segment:
        """Return the chunk's part of the pass."""
        tokens = self.session.token_ids[self.start : self.stop]
        return Segment(self.session.allocation, self.start, tokens, num_logits=int(self.is_last))


@dataclass(frozen=True, slots=True)
class VerifyItem:
    """A verify round of a session: the anchor token and the draft that is checked."""

    session: Session
    draft: DraftTree
    is_urgent: bool = True

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the round adds to a pass."""
        return len(self.draft) + 1

    def segment(self) -> Segment:
        """Return the round's part of the pass."""
        tokens = [self.session.token_ids[-1], *self.draft.token_ids]
        parents = () if self.draft.is_chain else (-1, *(parent + 1 for parent in self.draft.parent_indices))
        return Segment(self.session.allocation, self.session.cached_length, tokens, len(tokens), parents)


@dataclass(frozen=True, slots=True)
class SideWork:
    """Other work for the engine thread. It runs after the pass of its step, whose rounds wait for it."""

    function: Callable[[], Any]
    num_tokens: int = 0
    """Cost of the work, as the number of prefill tokens that take as long."""
    is_urgent: bool = False


PassItem = PrefillChunk | VerifyItem
StepItem = PassItem | SideWork


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a step for one item that picks tokens."""

    acceptance: DraftAcceptance
    logprobs: list[TokenLogprobs]
    """One entry per committed token. Empty: the session did not ask for log probabilities."""


class TargetModel:
    """Runs work items on the engine thread. It changes the KV pool, but never a session."""

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._picker = Picker(packed.vocab_size, packed.device)
        self._masks = MaskBuffers(packed.device)

    def step(self, items: Sequence[StepItem]) -> Sequence[Verdict | SpecdecError | Any]:
        """Run one forward pass over all items, then the side work.

        Returns:
            One entry per item: a verdict, or an error if the answer's format became too complex; None for a
            prefill chunk that does not end its prompt; for side work what its function returned, or an error
            if it failed.
        """
        in_pass = [item for item in items if not isinstance(item, SideWork)]
        verdicts = iter(self._pass(in_pass) if in_pass else ())
        return [_run(item) if isinstance(item, SideWork) else next(verdicts) for item in items]

    def _pass(self, items: Sequence[PassItem]) -> list[Verdict | SpecdecError | None]:
        captured = {name for item in items if item.session.state for name in item.session.state.hidden_names}
        logits = self._packed.forward([item.segment() for item in items], captured)
        deciding = [index for index, rows in enumerate(logits) if len(rows)]
        rounds = [(items[index].session, _draft_of(items[index])) for index in deciding]
        masks = self._masks.masks(rounds)  # while a GPU is still at the pass
        picks = self._picker.pick(
            [logits[index] for index in deciding],
            [
                session.pick_context(draft, row_masks.mask)
                for (session, draft), row_masks in zip(rounds, masks, strict=True)
            ],
        )
        verdicts: list[Verdict | SpecdecError | None] = [None] * len(items)
        for index, (session, draft), row_masks, item_picks in zip(
            deciding, rounds, masks, picks, strict=True
        ):
            if row_masks.error:
                verdicts[index] = row_masks.error
                continue
            verdict = _judge(session, draft, item_picks, logits[index], row_masks.unknown_nodes)
            self._compact(session, verdict.acceptance.path)
            verdicts[index] = verdict
        self._packed.pool.memory.record()
        return verdicts

    def _compact(self, session: Session, path: Sequence[int]) -> None:
        """Move the state of the accepted path to where a chain's would be, before anyone may read it."""
        moved = [(node, depth) for depth, node in enumerate(path) if node != depth]
        if not moved:
            return
        device = self._packed.device
        first = session.committed_length  # position of the draft's first token: the one after the anchor
        sources, targets = (first + torch.tensor(moved, device=device)).T
        hidden_names = session.state.hidden_names if session.state else ()
        self._packed.pool.move(session.allocation, sources, targets, hidden_names)


def _run(work: SideWork) -> Any:
    """Run side work and return its result, or its error: a failure must not end the step."""
    try:
        return work.function()
    except SpecdecError as error:
        return error
    except Exception as error:
        log_defect(logger, "side work failed", error)
        return InternalError(f"The engine failed: {type(error).__name__}: {error}")


def _draft_of(item: PassItem) -> DraftTree:
    return item.draft if isinstance(item, VerifyItem) else NO_DRAFT


def _judge(
    session: Session, draft: DraftTree, picks: Sequence[int], logits: Tensor, unknown_nodes: Collection[int]
) -> Verdict:
    acceptance = accept(
        draft,
        picks,
        stop_token_ids=session.stop_token_ids,
        max_tokens=session.num_remaining_tokens,
        unknown_nodes=unknown_nodes,
    )
    logprobs: list[TokenLogprobs] = []
    if session.num_top_logprobs is not None:
        rows = [0, *(node + 1 for node in acceptance.path)]
        logprobs = top_logprobs(logits[rows], [picks[row] for row in rows], session.num_top_logprobs)
    return Verdict(acceptance, logprobs)
