"""Trials of a model's rounding: does a token get the same bits whatever shares its pass?

The bits decide near-ties, so the promise of the same output with any drafter rests on them (see `attention`).
The trials run at start, on positions where kernels change their path: within the first block of keys, where a
block ends, and where the kernels' 512 keys end. The keys and values before those positions are random, which
costs no pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from specdec.runtime.attention import Segment
from specdec.runtime.kv_pool import KvAllocation, KvPool
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.tree_keys import Branches

logger = logging.getLogger(__name__)

_NUM_ROOM_TOKENS = 1088
"""Positions a trial uses, if the pool and the model have as many."""
_CHAIN_STARTS = (1, 375, 590)
_TREE_STARTS = (1, 375, 508, 1020)
"""Behind the last two, branches go on in the next 512 keys, and behind the last others begin with copies."""
_NUM_CHAIN_TOKENS = 16
_ALONE = (0, 1, 8, 9, 15)
"""Which tokens of a chain are computed alone as well. 375 + 8 and 375 + 9 are in different blocks."""
_NUM_TREE_TOKENS = 65
"""A root and the most draft tokens that are usual."""


@torch.inference_mode()
def settle_branches(packed: PackedModel) -> None:
    """Find out by trial how this machine rounds, and have branches of draft trees computed accordingly.

    On a CPU in bf16 a token should get the same bits in every pass; a warning says so where it does not.
    Branches go side by side if that changes no bit: only on CPUs with 512-bit vectors, whose order of
    summation is known, and only if the trial confirms it. On a GPU a pass of another size rounds otherwise
    in any case.
    """
    if packed.device.type != "cpu":
        packed.branches = Branches.MASKED
        return
    if packed.model.dtype.itemsize != 2:
        return
    if not tokens_round_alike(packed):
        logger.warning(
            "on this CPU a pass over several tokens rounds otherwise than one over a single token: where two "
            "tokens are almost equally likely, the output may depend on the drafts; --dtype float32 avoids it"
        )
    if _has_known_sums() and branches_round_alike(packed):
        packed.branches = Branches.EXACT


def _has_known_sums() -> bool:
    """Return whether this CPU's kernels sum over keys in the order that `tree_keys` knows."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def tokens_round_alike(packed: PackedModel) -> bool:
    """Return whether the tokens of a chain get the bits that each gets in a pass of its own."""
    with _random_context(packed) as (allocation, room):
        for start in _starts(_CHAIN_STARTS, room, _NUM_CHAIN_TOKENS):
            chain = _segment(packed, allocation, start, min(_NUM_CHAIN_TOKENS, room - start))
            together, _ = packed.trial_pass(chain)
            for index in (index for index in _ALONE if index < len(chain.token_ids)):
                token = chain.token_ids[index : index + 1]
                alone, _ = packed.trial_pass(Segment(allocation, start + index, token, 1))
                if not torch.equal(alone[0], together[index]):
                    return False
    return True


def branches_round_alike(packed: PackedModel) -> bool:
    """Return whether branches side by side get the bits that they get apart; False if none has room."""
    has_joined = False
    with _random_context(packed) as (allocation, room):
        for start in _starts(_TREE_STARTS, room, _NUM_TREE_TOKENS):
            num_tokens = min(_NUM_TREE_TOKENS, room - start)
            parents = [-1, *((index - 1) // (2 if index % 3 == 0 else 1) for index in range(1, num_tokens))]
            tree = replace(_segment(packed, allocation, start, num_tokens), parents=parents)
            apart, _ = packed.trial_pass(tree)
            joined, current = packed.trial_pass(tree, Branches.EXACT)
            has_joined = has_joined or current.has_joined
            if not torch.equal(apart, joined):
                return False
    return has_joined


@contextmanager
def _random_context(packed: PackedModel) -> Iterator[tuple[KvAllocation, int]]:
    """Memory for a trial, filled with keys and values, and how many positions it may use."""
    room = int(min(_NUM_ROOM_TOKENS, packed.pool.capacity_tokens, packed.max_length or math.inf))
    allocation = packed.pool.allocate(room)
    try:
        _fill(packed.pool, allocation)
        yield allocation, room
    finally:
        packed.pool.clear(allocation)
        packed.pool.free(allocation)


def _fill(pool: KvPool, allocation: KvAllocation) -> None:
    slots = allocation.slots(0, allocation.capacity)
    generator = torch.Generator(pool.device).manual_seed(1)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        shape = (allocation.capacity, *tensor.shape[1:])
        tensor[slots] = torch.randn(shape, generator=generator, dtype=tensor.dtype, device=pool.device)


def _starts(starts: Sequence[int], room: int, num_tokens: int) -> list[int]:
    """Return positions at which chains or trees begin, fewer in a small pool."""
    return [start for start in starts if start + num_tokens <= room] or [1]


def _segment(packed: PackedModel, allocation: KvAllocation, start: int, num_tokens: int) -> Segment:
    token_ids = packed.trial_tokens(num_tokens)
    return Segment(allocation, start, token_ids, num_tokens)
