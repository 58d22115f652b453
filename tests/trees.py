"""Random draft trees around what the target is going to say."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from specdec.contract.draft_tree import ANCHOR, DraftTree


def random_tree(random: Random, right: Sequence[int], *, num_wrong: int, vocab_size: int) -> DraftTree:
    """Return a tree with a path of the tokens `right` and `num_wrong` other nodes anywhere, in any lawful
    order.
    """
    children: dict[int, set[int]] = {ANCHOR: set()}
    nodes: list[tuple[int, int]] = []

    def add(parent: int, token_id: int) -> int:
        nodes.append((parent, token_id))
        children[parent].add(token_id)
        children[len(nodes) - 1] = set()
        return len(nodes) - 1

    tip, waiting = ANCHOR, list(right)
    to_come = [True] * len(right) + [False] * num_wrong
    random.shuffle(to_come)
    for is_right in to_come:
        if is_right and waiting[0] not in children[tip]:
            tip = add(tip, waiting.pop(0))
        else:
            parent = random.choice([tip, random.choice(list(children))])
            ahead = waiting[0] if waiting and parent == tip else None
            token_id = random.randrange(vocab_size)
            if token_id != ahead and token_id not in children[parent]:
                add(parent, token_id)
    return DraftTree.of([token_id for _, token_id in nodes], [parent for parent, _ in nodes])


def one_path(token_ids: Sequence[int]) -> list[int]:
    """Return the parent_indices of a chain."""
    return list(range(ANCHOR, len(token_ids) - 1))
