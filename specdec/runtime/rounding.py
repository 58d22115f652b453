"""A trial of a model's rounding: does a token get the same bits whatever shares its pass?

The bits decide near-ties, so the promise of the same output with any drafter rests on them. Our own kernels
keep them (`kernels.attention`), and so do products of limited size (`prepack`); torch's attention does so on
most CPUs. The trial runs at start, on positions where that changes its path: within the first block of keys,
where a block ends, and where its 512 keys end. The keys and values before those positions are random, which
costs no pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specdec.runtime.attention import Segment
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import KvAllocation
from specdec.runtime.packed_model import PackedModel

logger = logging.getLogger(__name__)

_NUM_ROOM_TOKENS = 640
"""Positions the trial uses, if the pool and the model have as many."""
_STARTS = (1, 375, 590)
_NUM_TOKENS = 16
_ALONE = (0, 1, 8, 9, 15)
"""Which tokens of a chain are computed alone as well. 375 + 8 and 375 + 9 are in different blocks."""


@torch.inference_mode()
def try_rounding(packed: PackedModel) -> None:
    """Find out whether tokens round alike on this machine, and warn if they do not.

    Of models in bf16 or fp16 on a CPU. On a GPU a pass of another size rounds otherwise in any case.
    """
    is_tried = packed.device.type == "cpu" and packed.model.dtype.itemsize == 2
    if is_tried and not tokens_round_alike(packed):
        logger.warning(
            "on this CPU a pass over several tokens rounds otherwise than one over a single token: where two "
            "tokens are almost equally likely, the output may depend on the drafts; --dtype float32 avoids it"
        )


def tokens_round_alike(packed: PackedModel) -> bool:
    """Return whether the tokens of a chain get the bits that each gets in a pass of its own."""
    with _random_context(packed) as (allocation, room):
        for start in [start for start in _STARTS if start + _NUM_TOKENS <= room] or [1]:
            tokens = packed.trial_tokens(min(_NUM_TOKENS, room - start))
            together, _ = packed.trial_pass(Segment(allocation, start, tokens, len(tokens)))
            for index in (index for index in _ALONE if index < len(tokens)):
                token = tokens[index : index + 1]
                alone, _ = packed.trial_pass(Segment(allocation, start + index, token, 1))
                if not torch.equal(alone[0], together[index]):
                    return False
    return True


@contextmanager
def _random_context(packed: PackedModel) -> Iterator[tuple[KvAllocation, int]]:
    """Memory for a trial, filled with keys and values, and how many positions it may use."""
    room = int(min(_NUM_ROOM_TOKENS, packed.pool.most_whole_tokens, packed.max_length or math.inf))
    allocation = packed.pool.allocate(room)
    try:
        _fill(packed.pool, allocation)
        yield allocation, room
    finally:
        packed.pool.clear(allocation)
        packed.pool.free(allocation)


def _fill(pool: KvPool, allocation: KvAllocation) -> None:
    generator = torch.Generator(pool.device).manual_seed(1)
    for layer, tensor in (*pool.keys.items(), *pool.values.items()):
        slots = allocation.table(pool.is_sliding(layer)).slots(0, allocation.capacity)
        shape = (allocation.capacity, *tensor.shape[1:])
        tensor[slots] = torch.randn(shape, generator=generator, dtype=tensor.dtype, device=pool.device)
