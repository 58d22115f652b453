"""When a drafter service without room tells a session to try again, and how busy it says it is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem, DraftSession, OpenDraft
from drafter_service.host import DrafterHost
from specdec.contract.errors import ResourceExhaustedError
from specdec.contract.load import Load
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.state.reader import ReaderConfig, StateReader

MIRROR_BYTES = 1000
BLOCK = 64
NUM_BLOCKS = 8


class Pooled(Drafter):
    """A drafter with KV of its own, of which each session takes as much as its text may grow to."""

    def __init__(self) -> None:
        self.traits = DrafterTraits("pooled", "pooled", 8, 2)
        shape = KvShape(num_heads=1, key_dim=1, value_dim=1)
        block_bytes = shape.num_elements * 4 * BLOCK
        self.kv_pool = KvPool(
            {0: shape},
            budget_bytes=block_bytes * NUM_BLOCKS,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def open(self, request: OpenDraft) -> DraftSession:
        return PooledSession(request, self.kv_pool.allocate(request.max_length))

    def close(self, session: DraftSession) -> None:
        assert isinstance(session, PooledSession)
        self.kv_pool.free(session.allocation)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        return [[] for _ in items]


class PooledSession(DraftSession):
    def __init__(self, request: OpenDraft, allocation: Any) -> None:
        super().__init__(request)
        self.allocation = allocation

    @property
    def num_reserved_tokens(self) -> int:
        return self.allocation.capacity  # type: ignore[no-any-return]


class Plain(Pooled):
    """A drafter that takes nothing but a slot."""

    def __init__(self) -> None:
        self.traits = DrafterTraits("plain", "plain", 8, 2)

    def open(self, request: OpenDraft) -> DraftSession:
        return DraftSession(request)

    def close(self, session: DraftSession) -> None: ...


@dataclass
class Mirror:
    """Stands for the state that a session streams."""

    num_reserved_bytes: int

    async def close(self) -> None: ...


@pytest.fixture
async def host() -> AsyncIterator[DrafterHost]:
    reader = StateReader(ReaderConfig("stream", torch.device("cpu"), None, MIRROR_BYTES))
    drafters = {"pooled": Pooled(), "plain": Plain()}
    made = DrafterHost(drafters, DrafterConfig(max_sessions=3), reader=reader)
    yield made
    made.close()
    await reader.close()


async def running(
    host: DrafterHost, stack: AsyncExitStack, drafter: str, *, ends_in_s: float, max_length: int = 101
) -> DraftSession:
    """Open a session that has made half of its tokens, and the others in so many seconds if it goes on so."""
    request = OpenDraft((1,), 1, max_length)
    session = await stack.enter_async_context(host.open(host.drafter(drafter), request))
    half = (max_length - 1) // 2
    session.commit([1] * half, half + 1)
    session._opened_at = time.monotonic() - ends_in_s
    return session


async def refusal(host: DrafterHost, drafter: str, max_length: int = 101) -> ResourceExhaustedError:
    with pytest.raises(ResourceExhaustedError) as raised:
        async with host.open(host.drafter(drafter), OpenDraft((1,), 1, max_length)):
            pass
    return raised.value


async def test_slots_are_free_once_the_first_session_should_have_ended(host: DrafterHost) -> None:
    async with AsyncExitStack() as stack:
        for ends_in_s in (40, 9.5, 20):
            await running(host, stack, "plain", ends_in_s=ends_in_s)
        refused = await refusal(host, "plain")
        assert (refused.reason, refused.retry_after_s) == ("NO_SESSION_SLOT", 10)
    assert host.num_sessions == 0


async def test_kv_is_free_once_enough_sessions_of_that_drafter_have_ended(host: DrafterHost) -> None:
    async with AsyncExitStack() as stack:
        await running(host, stack, "plain", ends_in_s=1.5)
        await running(host, stack, "pooled", ends_in_s=9.5, max_length=2 * BLOCK)
        await running(host, stack, "pooled", ends_in_s=29.5, max_length=6 * BLOCK)
        host.config = DrafterConfig(max_sessions=8)
        small, large = [await refusal(host, "pooled", blocks * BLOCK) for blocks in (2, 3)]
        assert (small.reason, small.retry_after_s) == ("KV_POOL_FULL", 10)
        assert (large.reason, large.retry_after_s) == ("KV_POOL_FULL", 30)


async def test_mirrors_have_room_once_enough_sessions_that_stream_have_ended(host: DrafterHost) -> None:
    assert host.reader
    async with AsyncExitStack() as stack:
        for num_bytes, ends_in_s in ((0, 1.5), (300, 9.5), (600, 29.5)):
            session = await running(host, stack, "plain", ends_in_s=ends_in_s)
            session.state = Mirror(num_bytes)  # type: ignore[assignment]
            host.reader.mirrors.take(num_bytes)
        for num_bytes, expected in ((400, 10), (401, 30)):
            with pytest.raises(ResourceExhaustedError) as raised:
                host.reader.mirrors.take(num_bytes)
            assert (raised.value.reason, raised.value.retry_after_s) == ("MIRROR_FULL", expected)


async def test_the_load_is_that_of_all_drafters(host: DrafterHost) -> None:
    capacity = NUM_BLOCKS * BLOCK
    assert host.current_load == Load(0, 3, 0, capacity, capacity)
    async with AsyncExitStack() as stack:
        await running(host, stack, "plain", ends_in_s=1)
        await running(host, stack, "pooled", ends_in_s=1)
        assert host.current_load == Load(2, 3, 0, capacity, capacity - 2 * BLOCK)
