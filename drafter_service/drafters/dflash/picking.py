"""From the states of a block to draft tokens: chains and trees, with and without a Markov head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from drafter_service.drafters.base import Drafted, DraftSession
from drafter_service.drafters.dflash.markov import MarkovHead
from drafter_service.drafters.dflash.rounds import BlockRound
from drafter_service.drafters.growing import MAX_CHILDREN, Candidates, GrowingTree
from drafter_service.drafters.head import DraftHead
from specdec.runtime.picks import PickContext
from specdec.state.weights import TargetWeights


class BlockPicker:
    """Picks the draft tokens of all rounds of a pass.

    Args:
        head: the drafter's LM head, its own or the target's.
        markov: makes a draft depend on the one before it; None: drafts of a block do not depend on each
            other.
        dtype: data type of the drafter's states.
        device: device of the drafter's states.
    """

    def __init__(
        self, head: DraftHead, markov: MarkovHead | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._head, self._markov = head, markov
        self._dtype, self._device = dtype, device

    def draft(self, rounds: Sequence[BlockRound], states: Tensor, weights: TargetWeights) -> list[Drafted]:
        """Pick every round's draft, chains and trees apart.

        Args:
            states: states of the blocks [num_rows, hidden_size], round after round.
        """
        blocks = states.split([len(part.block) for part in rounds])
        # The anchor's own place comes first, and drafts nothing unless the checkpoint says so.
        places = [block[-part.num_drafts :] for part, block in zip(rounds, blocks, strict=True)]
        drafts: list[Drafted] = [[] for _ in rounds]
        for draft, is_tree in ((self._draft_chains, False), (self._draft_trees, True)):
            chosen = [index for index, part in enumerate(rounds) if (part.tree is not None) == is_tree]
            if chosen:
                own = torch.cat([places[index] for index in chosen])
                found = draft([rounds[index] for index in chosen], own, weights)
                for index, drafted in zip(chosen, found, strict=True):
                    drafts[index] = drafted
        return drafts

    def _draft_chains(
        self, rounds: Sequence[BlockRound], states: Tensor, weights: TargetWeights
    ) -> Sequence[Drafted]:
        """Pick the likeliest token of every place.

        Args:
            states: states of the places that draft [num_rows, hidden_size], round after round.
        """
        if self._markov:
            return self._draft_in_order(rounds, states, self._markov, weights)
        counts = [part.num_drafts for part in rounds]
        logits = self._head.logits(states, weights)
        contexts = [_pick_context(part.session) for part in rounds]
        picks = self._head.pick(logits, counts, contexts, weights)
        return [
            draft[: self._num_sure(part.session, rows, draft)]
            for part, rows, draft in zip(rounds, logits.split(counts), picks, strict=True)
        ]

    def _draft_in_order(
        self, rounds: Sequence[BlockRound], states: Tensor, markov: MarkovHead, weights: TargetWeights
    ) -> list[list[int]]:
        """Pick token by token, the rounds side by side: each pick corrects the state of the next place.

        Args:
            states: states of the places that draft [num_rows, hidden_size], round after round.
        """
        prepared = markov.prepared(states)
        firsts = list(accumulate((part.num_drafts for part in rounds), initial=0))
        drafts: list[list[int]] = [[] for _ in rounds]
        running = list(range(len(rounds)))
        for step in range(max(part.num_drafts for part in rounds)):
            rows = torch.tensor([firsts[index] + step for index in running], device=self._device)
            before = [drafts[index][-1] if step else rounds[index].block[0] for index in running]
            embeddings = weights.embed(torch.tensor(before, device=self._device)).to(self._dtype)
            logits = self._head.logits(states[rows] + markov.correction(prepared[rows], embeddings), weights)
            contexts = [_pick_context(rounds[index].session, drafts[index]) for index in running]
            picks = self._head.pick(logits, [1] * len(running), contexts, weights)
            running = [
                index
                for index, (pick,), row in zip(running, picks, logits, strict=True)
                if self._head.extend(drafts[index], pick, row, rounds[index].session.min_draft_confidence)
                and step + 1 < rounds[index].num_drafts
            ]
            if not running:
                break
        return drafts

    def _draft_trees(
        self, rounds: Sequence[BlockRound], states: Tensor, weights: TargetWeights
    ) -> Sequence[Drafted]:
        """Pick the likeliest paths, by the product of what their places say; arguments as of
        _draft_chains."""
        trees = [part.tree for part in rounds if part.tree]
        if self._markov:
            self._grow_trees(rounds, trees, states, self._markov, weights)
            return [tree.tree() for tree in trees]
        logits = self._head.logits(states, weights)
        contexts = [_pick_context(part.session) for part in rounds]
        counts = [part.num_drafts for part in rounds]
        found = self._head.candidates(logits, counts, contexts, weights, MAX_CHILDREN)
        return [tree.best_paths(_by_depth(places)) for tree, places in zip(trees, found, strict=True)]

    def _grow_trees(
        self,
        rounds: Sequence[BlockRound],
        trees: Sequence[GrowingTree],
        states: Tensor,
        markov: MarkovHead,
        weights: TargetWeights,
    ) -> None:
        """Expand every tree's likeliest leaves step by step; their tokens correct the next places' states.

        Args:
            states: states of the places that draft [num_rows, hidden_size], round after round.
        """
        prepared = markov.prepared(states)
        firsts = list(accumulate((part.num_drafts for part in rounds), initial=0))
        for _ in range(max(part.num_drafts for part in rounds)):
            leaves = [(at, node) for at, tree in enumerate(trees) for node in tree.frontier()]
            if not leaves:
                return
            paths = [trees[at].path(node) for at, node in leaves]
            contexts = [
                _pick_context(rounds[at].session, path) for (at, _), path in zip(leaves, paths, strict=True)
            ]
            rows = torch.tensor(
                [firsts[at] + len(path) for (at, _), path in zip(leaves, paths, strict=True)],
                device=self._device,
            )
            before = torch.tensor([context.token_ids[-1] for context in contexts], device=self._device)
            embeddings = weights.embed(before).to(self._dtype)
            logits = self._head.logits(states[rows] + markov.correction(prepared[rows], embeddings), weights)
            found = self._head.candidates(logits, [1] * len(leaves), contexts, weights, MAX_CHILDREN)
            for (at, node), (candidates,) in zip(leaves, found, strict=True):
                trees[at].expand(node, candidates)

    def _num_sure(self, session: DraftSession, logits: Tensor, draft: Sequence[int]) -> int:
        """Count the tokens of a draft before the first unlikely one, at least one.

        Args:
            logits: [num_drafts, draft_vocab_size].
        """
        threshold = session.min_draft_confidence
        if not threshold:
            return len(draft)
        for index, token_id in enumerate(draft):
            if self._head.confidence(logits[index], token_id) < threshold:
                return max(index, 1)
        return len(draft)


def _by_depth(places: Sequence[Candidates]) -> Callable[[Sequence[int]], Candidates]:
    """Return what may follow a path where that depends on the path's length only."""
    return lambda path: places[len(path)]


def _pick_context(session: DraftSession, draft: Sequence[int] = ()) -> PickContext:
    return PickContext(session.sampling, [*session.token_ids, *draft], session.prompt_length)
