from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.target_state import GENERATIONS, SharedMemory
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.runtime.memory import SharedHostMemory, StateMemory
from specdec.runtime.state_files import SharedDirectory
from tests.leftovers import nothing_left

SHAPES = {0: KvShape(2, 4, 4), 3: KvShape(1, 8, 2)}
BLOCK_BYTES = (2 * 8 + 10) * 4 * BLOCK_TOKENS


def make_pool(num_blocks: int, memory: StateMemory | None = None) -> KvPool:
    return KvPool(
        SHAPES,
        budget_bytes=num_blocks * BLOCK_BYTES,
        dtype=torch.float32,
        device=torch.device("cpu"),
        memory=memory,
    )


def slot_ids(allocation: KvAllocation, start: int, stop: int) -> list[int]:
    slots = allocation.slots(start, stop)
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()


def test_the_budget_is_the_memory() -> None:
    pool = make_pool(10)
    tensors = [*pool.keys.values(), *pool.values.values()]
    assert sum(tensor.nbytes for tensor in tensors) == 10 * BLOCK_BYTES
    assert pool.capacity_tokens == pool.free_tokens == 10 * BLOCK_TOKENS


@settings(max_examples=200, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.sampled_from(["open", "grow", "free"]), st.integers(0, 99)), max_size=60),
)
def test_what_grows_keeps_its_blocks_and_takes_no_one_elses(
    num_blocks: int, actions: list[tuple[str, int]]
) -> None:
    pool, live = make_pool(num_blocks), list[KvAllocation]()
    for action, number in actions:
        free = pool.free_tokens
        if action == "open" and free:
            live.append(pool.allocate(number % free + 1, will_grow=True))
        elif action == "grow" and live:
            index = number % len(live)
            before = live[index]
            num_tokens = before.capacity + 1 + number % (2 * BLOCK_TOKENS)
            grown = pool.grow(before, num_tokens)
            if grown is None:
                assert num_tokens > before.capacity + free
                assert pool.free_tokens == free
                continue
            assert grown.capacity - BLOCK_TOKENS < num_tokens <= grown.capacity
            assert grown.blocks[: len(before.blocks)] == before.blocks
            assert (grown.generation, grown.new_from) == (before.generation, before.capacity)
            live[index] = grown
        elif action == "free" and live:
            pool.free(live.pop(number % len(live)))
        held = [block for each in live for block in each.blocks]
        assert len(held) == len(set(held))
        assert len(held) * BLOCK_TOKENS + pool.free_tokens == pool.capacity_tokens
    for allocation in live:
        pool.free(allocation)
    assert pool.free_tokens == pool.capacity_tokens


def test_sessions_that_grow_side_by_side_stay_runs() -> None:
    pool = make_pool(64)
    live = [pool.allocate(BLOCK_TOKENS, will_grow=True) for _ in range(4)]
    for num_blocks in range(2, 17):
        for index, allocation in enumerate(live):
            grown = pool.grow(allocation, num_blocks * BLOCK_TOKENS)
            assert grown
            assert grown.slot_ids is None, "it is read as a view"
            live[index] = grown
    assert pool.free_tokens == 0
    assert pool.grow(live[0], 17 * BLOCK_TOKENS) is None
    pool.free(live.pop(1))
    scattered = pool.grow(live[1], 17 * BLOCK_TOKENS)
    assert scattered
    assert slot_ids(scattered, 0, 16 * BLOCK_TOKENS) == slot_ids(live[1], 0, 16 * BLOCK_TOKENS)


def test_what_is_spared_stays_free_and_what_is_new_is_cleared() -> None:
    pool = make_pool(4)
    with pytest.raises(ResourceExhaustedError, match="64 are kept for those who run") as refusal:
        pool.allocate(4 * BLOCK_TOKENS, num_spared=1)
    assert refusal.value.reason == "KV_POOL_FULL"
    assert pool.free_tokens == 4 * BLOCK_TOKENS
    first = pool.allocate(2 * BLOCK_TOKENS, num_spared=2)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(7)
    grown = pool.grow(first, 3 * BLOCK_TOKENS)
    assert grown
    pool.clear(grown)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        assert (tensor[grown.slots(0, first.capacity)] == 7).all()
        assert not tensor[grown.slots(first.capacity, grown.capacity)].any()


def generations(pool: KvPool) -> list[int]:
    """Return what readers see: the owner's generation of each block, 0 for none."""
    ref = pool.ref(GENERATIONS)
    assert isinstance(ref.storage, SharedMemory)
    data = Path(ref.storage.path).read_bytes()
    return numpy.frombuffer(data, numpy.int64, count=ref.shape[0], offset=ref.storage.offset).tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4 * BLOCK_TOKENS)), max_size=30))
def test_every_owner_of_a_block_has_a_generation_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[bool, int]]
) -> None:
    memory = SharedHostMemory(SharedDirectory(tmp_path_factory.mktemp("pool")), strict=True)
    pool, live, seen = make_pool(8, memory), [], set()
    for release, num_tokens in actions:
        if release and live:
            pool.free(live.pop(num_tokens % len(live)))
        elif num_tokens <= pool.free_tokens:
            live.append(pool.allocate(num_tokens, will_grow=True))
            assert live[-1].generation > 0
            assert live[-1].generation not in seen
            seen.add(live[-1].generation)
        elif live and (grown := pool.grow(live[0], live[0].capacity + 1)):
            live[0] = grown
        owners = {block: each.generation for each in live for block in each.blocks}
        assert generations(pool) == [owners.get(block, 0) for block in range(8)]
    memory.close()


def test_hidden_states_take_memory_only_until_they_are_removed(tmp_path: Path) -> None:
    directory = SharedDirectory(tmp_path)
    with nothing_left(tmp_path):
        memory = SharedHostMemory(directory, strict=True)
        pool = make_pool(2, memory)
        with nothing_left(tmp_path):
            for size in range(1, 11):
                pool.add_hidden("hidden.3", size)
                pool.add_hidden("hidden.3", size)
                assert pool.ref("hidden.3").shape == (2 * BLOCK_TOKENS, size)
                assert pool.tensor("hidden.3").shape == (2 * BLOCK_TOKENS, size)
                assert not pool.tensor("hidden.3").any()
                pool.remove_hidden("hidden.3")
                pool.remove_hidden("hidden.3")
                with pytest.raises(KeyError):
                    pool.ref("hidden.3")
        memory.close()
        del pool


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


def test_runs_are_the_slots_in_order() -> None:
    cpu = torch.device("cpu")
    for blocks in ((2, 3, 4), (4, 0, 2), (1, 2, 0)):
        allocation = KvAllocation.of(blocks, cpu)
        for start, stop in ((0, 192), (5, 70), (63, 65), (64, 64), (130, 192)):
            in_runs = [slot for run in allocation.runs(start, stop) for slot in range(run.start, run.stop)]
            assert in_runs == slot_ids(allocation, start, stop)
            assert len(in_runs) == stop - start
