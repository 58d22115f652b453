"""How a pool's memory is divided between layers that attend to all of a text and those with a sliding window.

A layer with a sliding window needs the last positions only, so its blocks go back to the pool as a text gets
longer. The two kinds of layers have blocks of their own, as many as texts of a given length take.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlidingLayers:
    """The layers of a model with a sliding window, where others attend to all of a text."""

    layers: frozenset[int]
    window: int
    """How many keys a query sees, its own included."""
    pass_tokens: int
    """Most tokens that a pass adds to a session: of a prompt, or of a draft twice, for a round's state stays
    for the length of another."""
    session_tokens: int
    """How long the texts are that the memory is divided for, tokens."""

    @property
    def num_kept(self) -> int:
        """Positions before the next token that stay: what it sees, and one more, which drafters see."""
        return self.window + 1

    def usual_blocks(self, block_tokens: int) -> int:
        """Return how many blocks a long session has between its passes, at most."""
        return _blocks_of(self.num_kept, block_tokens) + 2

    def most_blocks(self, block_tokens: int) -> int:
        """Return how many blocks a session has at any time, at most."""
        return _blocks_of(self.num_kept + self.pass_tokens, block_tokens) + 2


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What a block takes in all layers of a kind, bytes."""

    full: int
    sliding: int


def divide(
    budget_bytes: int, block: BlockBytes, sliding: SlidingLayers, block_tokens: int
) -> tuple[int, int]:
    """Return how many blocks there are for layers that attend to all of a text, and for the others.

    Both kinds run out at the same number of sessions that are as long as was said. A pool that is too small
    for one of them holds the longest session that it can.
    """
    num_even = budget_bytes // (block.full + block.sliding)
    length = _blocks_of(sliding.session_tokens, block_tokens)
    in_window = min(length, sliding.usual_blocks(block_tokens))
    num_sessions = budget_bytes / (length * block.full + in_window * block.sliding)
    least = min(num_even, sliding.most_blocks(block_tokens))
    num_sliding = max(least, int(num_sessions * in_window))
    return (budget_bytes - num_sliding * block.sliding) // block.full, num_sliding


def _blocks_of(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)
