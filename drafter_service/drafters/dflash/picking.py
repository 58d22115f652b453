"""From the states of a block to draft tokens: chains and trees, with and without links between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from drafter_service.drafters.base import Confidence, Drafted, DraftSession
from drafter_service.drafters.dflash.links import LinkedPlaces, Links, Places, Walk
from drafter_service.drafters.dflash.rounds import BlockRound
from drafter_service.drafters.growing import MAX_CHILDREN, Candidates, GrowingTree
from drafter_service.drafters.head import DraftHead
from specdec.contract.draft_tree import ANCHOR
from specdec.runtime.picks import PickContext
from specdec.state.weights import TargetWeights


class BlockPicker:
    """Picks the draft tokens of all rounds of a pass.

    Args:
        head: the drafter's LM head, its own or the target's.
        links: make a draft depend on the one before it; None: drafts of a block do not depend on each other.
    """

    def __init__(self, head: DraftHead, links: Links | None, device: torch.device) -> None:
        self._head, self._links, self._device = head, links, device

    def draft(self, rounds: Sequence[BlockRound], states: Tensor, weights: TargetWeights) -> list[Drafted]:
        """Pick every round's draft, chains and trees apart.

        Args:
            states: states of the blocks [num_rows, hidden_size], round after round.
        """
        blocks = states.split([len(part.block) for part in rounds])
        drafts: list[Drafted] = [[] for _ in rounds]
        for draft, is_tree in ((self._draft_chains, False), (self._draft_trees, True)):
            chosen = [index for index, part in enumerate(rounds) if (part.tree is not None) == is_tree]
            if chosen:
                own = [blocks[index] for index in chosen]
                found = draft([rounds[index] for index in chosen], own, weights)
                for index, drafted in zip(chosen, found, strict=True):
                    drafts[index] = drafted
        return drafts

    def _draft_chains(
        self, rounds: Sequence[BlockRound], blocks: Sequence[Tensor], weights: TargetWeights
    ) -> Sequence[Drafted]:
        """Pick the likeliest token of every place.

        Args:
            blocks: each block's states [num_rows, hidden_size].
        """
        if self._links:
            return self._draft_in_order(rounds, self._walk(self._links, rounds, blocks, weights), weights)
        counts = [part.num_drafts for part in rounds]
        logits = self._head.logits(_drafting(rounds, blocks), weights)
        contexts = [_pick_context(part.session) for part in rounds]
        picks = self._head.pick(logits, counts, contexts, weights)
        return [
            draft[: self._num_sure(part.session, rows, draft)]
            for part, rows, draft in zip(rounds, logits.split(counts), picks, strict=True)
        ]

    def _walk(
        self, links: Links, rounds: Sequence[BlockRound], blocks: Sequence[Tensor], weights: TargetWeights
    ) -> Walk:
        """Return the links' walk over all places that draft."""
        anchors = torch.tensor([part.block[0] for part in rounds], device=self._device)
        anchor_states = None
        if len(rounds[0].block) > rounds[0].num_drafts:
            anchor_states = torch.stack([block[0] for block in blocks])
        return links.walk(Places(_drafting(rounds, blocks), anchors, anchor_states), self._head, weights)

    def _draft_in_order(
        self, rounds: Sequence[BlockRound], walk: Walk, weights: TargetWeights
    ) -> list[list[int]]:
        """Pick token by token, the rounds side by side: each pick corrects the next place."""
        firsts = _firsts(rounds)
        drafts: list[list[int]] = [[] for _ in rounds]
        sure = [part.session.confidence() for part in rounds]
        running, memory = list(range(len(rounds))), walk.begin()
        for step in range(max(part.num_drafts for part in rounds)):
            rows = self._indices([firsts[index] + step for index in running])
            before = [drafts[index][-1] if step else rounds[index].block[0] for index in running]
            found = walk.follow(rows, self._indices(before), memory)
            contexts = [_pick_context(rounds[index].session, drafts[index]) for index in running]
            picks = self._head.pick(found.logits, [1] * len(running), contexts, weights)
            going_on = [
                row
                for row, (index, (pick,)) in enumerate(zip(running, picks, strict=True))
                if self._extend(sure[index], drafts[index], pick, found, row)
                and step + 1 < rounds[index].num_drafts
            ]
            if not going_on:
                break
            memory = None if found.memory is None else found.memory[going_on]
            running = [running[row] for row in going_on]
        return drafts

    def _extend(
        self, confidence: Confidence, draft: list[int], pick: int, found: LinkedPlaces, row: int
    ) -> bool:
        """Append a pick to a draft, unless it is unlikely and not the first; return whether it was likely."""
        if found.confidence is None or not confidence.matters:
            return self._head.extend(draft, pick, found.logits[row], confidence)
        is_sure = confidence.takes(found.confidence[row].item())
        if is_sure or not draft:
            draft.append(pick)
        return is_sure

    def _draft_trees(
        self, rounds: Sequence[BlockRound], blocks: Sequence[Tensor], weights: TargetWeights
    ) -> Sequence[Drafted]:
        """Pick the likeliest paths, by the product of what their places say; arguments as of
        _draft_chains."""
        trees = [part.tree for part in rounds if part.tree]
        if self._links:
            self._grow_trees(rounds, trees, self._walk(self._links, rounds, blocks, weights), weights)
            return [tree.tree() for tree in trees]
        logits = self._head.logits(_drafting(rounds, blocks), weights)
        contexts = [_pick_context(part.session) for part in rounds]
        counts = [part.num_drafts for part in rounds]
        found = self._head.candidates(logits, counts, contexts, weights, MAX_CHILDREN)
        return [tree.best_paths(_by_depth(places)) for tree, places in zip(trees, found, strict=True)]

    def _grow_trees(
        self,
        rounds: Sequence[BlockRound],
        trees: Sequence[GrowingTree],
        walk: Walk,
        weights: TargetWeights,
    ) -> None:
        """Expand every tree's likeliest leaves step by step; their tokens correct the next places."""
        firsts, first_memory = _firsts(rounds), walk.begin()
        after: list[dict[int, Tensor]] = [{} for _ in rounds]
        """What the links remember behind each node that was expanded, for each round."""
        for _ in range(max(part.num_drafts for part in rounds)):
            leaves = [(at, node) for at, tree in enumerate(trees) for node in tree.frontier()]
            if not leaves:
                return
            paths = [trees[at].path(node) for at, node in leaves]
            contexts = [
                _pick_context(rounds[at].session, path) for (at, _), path in zip(leaves, paths, strict=True)
            ]
            rows = [firsts[at] + len(path) for (at, _), path in zip(leaves, paths, strict=True)]
            memory = None
            if first_memory is not None:
                memory = torch.stack(
                    [
                        first_memory[at] if node == ANCHOR else after[at][trees[at].parent(node)]
                        for at, node in leaves
                    ]
                )
            before = [context.token_ids[-1] for context in contexts]
            found = walk.follow(self._indices(rows), self._indices(before), memory)
            families = self._head.candidates(found.logits, [1] * len(leaves), contexts, weights, MAX_CHILDREN)
            for row, ((at, node), (candidates,)) in enumerate(zip(leaves, families, strict=True)):
                threshold = rounds[at].session.min_draft_confidence
                is_sure = found.confidence is None or bool(found.confidence[row] >= threshold)
                trees[at].expand(
                    node,
                    candidates if is_sure or node == ANCHOR else (),
                    are_sure=is_sure and found.confidence is not None,
                )
                if found.memory is not None:
                    after[at][node] = found.memory[row]

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _num_sure(self, session: DraftSession, logits: Tensor, draft: Sequence[int]) -> int:
        """Count the tokens of a draft before the first unlikely one, at least one.

        Args:
            logits: [num_drafts, draft_vocab_size].
        """
        confidence = session.confidence()
        if not confidence.matters:
            return len(draft)
        for index, token_id in enumerate(draft):
            if not confidence.takes(self._head.confidence(logits[index], token_id)):
                return max(index, 1)
        return len(draft)


def _drafting(rounds: Sequence[BlockRound], blocks: Sequence[Tensor]) -> Tensor:
    """Return the states of the places that draft [num_places, hidden_size], block after block.

    The anchor's own place comes first, and drafts nothing unless the checkpoint says so.
    """
    return torch.cat([block[-part.num_drafts :] for part, block in zip(rounds, blocks, strict=True)])


def _firsts(rounds: Sequence[BlockRound]) -> list[int]:
    """Return where each round's places begin among all that draft."""
    return list(accumulate((part.num_drafts for part in rounds), initial=0))


def _by_depth(places: Sequence[Candidates]) -> Callable[[Sequence[int]], Candidates]:
    """Return what may follow a path where that depends on the path's length only."""
    return lambda path: places[len(path)]


def _pick_context(session: DraftSession, draft: Sequence[int] = ()) -> PickContext:
    return PickContext(session.sampling, [*session.token_ids, *draft], session.prompt_length)
