from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.runtime.kv_pool import BLOCK_TOKENS, KvAllocation, KvPool, KvShape

SHAPES = {0: KvShape(2, 4, 4), 3: KvShape(1, 8, 2)}
BLOCK_BYTES = (2 * 8 + 10) * 4 * BLOCK_TOKENS


def make_pool(num_blocks: int) -> KvPool:
    return KvPool(
        SHAPES, budget_bytes=num_blocks * BLOCK_BYTES, dtype=torch.float32, device=torch.device("cpu")
    )


def slot_ids(allocation: KvAllocation, start: int, stop: int) -> list[int]:
    slots = allocation.slots(start, stop)
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()


def test_the_budget_is_the_memory() -> None:
    pool = make_pool(10)
    tensors = [*pool.keys.values(), *pool.values.values()]
    assert sum(tensor.nbytes for tensor in tensors) == 10 * BLOCK_BYTES
    assert pool.capacity_tokens == pool.free_tokens == 10 * BLOCK_TOKENS


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * BLOCK_TOKENS)), max_size=40))
def test_no_slot_is_ever_shared_or_lost(actions: list[tuple[bool, int]]) -> None:
    pool, live = make_pool(12), []
    for release, num_tokens in actions:
        if release and live:
            pool.free(live.pop(num_tokens % len(live)))
            continue
        try:
            allocation = pool.allocate(num_tokens)
        except ResourceExhaustedError:
            assert num_tokens > pool.free_tokens
            continue
        assert allocation.capacity >= num_tokens
        live.append(allocation)
        owned = [slot for each in live for slot in slot_ids(each, 0, each.capacity)]
        assert len(owned) == len(set(owned))
        assert len(owned) + pool.free_tokens == pool.capacity_tokens
    for allocation in live:
        pool.free(allocation)
    assert pool.free_tokens == pool.capacity_tokens


def test_a_run_is_a_view_and_scattered_blocks_are_not() -> None:
    pool = make_pool(4)
    first, second, third, fourth = (pool.allocate(BLOCK_TOKENS) for _ in range(4))
    assert first.slots(2, 5) == slice(2, 5)
    pool.free(first)
    pool.free(third)
    scattered = pool.allocate(2 * BLOCK_TOKENS)
    assert slot_ids(scattered, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1) == [BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS]
    assert scattered.slot_ids is not None
    pool.free(second)
    pool.free(fourth)
    pool.free(scattered)
    assert pool.allocate(4 * BLOCK_TOKENS).slot_ids is None


def test_refusals_say_what_to_do() -> None:
    pool = make_pool(2)
    with pytest.raises(InvalidArgumentError, match="larger --kv-cache-mib"):
        pool.allocate(2 * BLOCK_TOKENS + 1)
    held = pool.allocate(BLOCK_TOKENS + 1)
    with pytest.raises(ResourceExhaustedError, match="0 of 128 are free") as refusal:
        pool.allocate(1)
    assert refusal.value.retry_after_s
    pool.free(held)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(held)
    with pytest.raises(InvalidArgumentError, match="less than one block"):
        make_pool(0)
