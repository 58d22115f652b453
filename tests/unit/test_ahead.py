"""Rounds that run while their predecessors are dealt with: order, limits, failures, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from gateway.rounds.ahead import buffered, one_ahead
from gateway.rounds.vocabulary import Draft, Round, Verified
from specdec.contract.errors import UnavailableError


class Rounds:
    """Makes rounds whose bonus tokens are 0, 1, 2, ..., and notes what happens to them."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self._count = count
        self._error = error
        self.num_begun = 0
        self.closed = asyncio.Event()

    async def __call__(self) -> AsyncGenerator[Round]:
        try:
            for index in range(self._count):
                self.num_begun += 1
                await asyncio.sleep(0)
                yield Round(Draft(), Verified(0, index))
            if self._error:
                raise self._error
        finally:
            self.closed.set()


def number(current: Round) -> int:
    return current.verified.bonus_token_id


async def test_every_round_comes_once_and_in_order() -> None:
    rounds = Rounds(5)
    assert [number(current) async for current in one_ahead(rounds())] == list(range(5))
    assert rounds.closed.is_set()


async def test_the_next_round_has_begun_when_a_round_comes() -> None:
    rounds = Rounds(4)
    begun = [(number(current), rounds.num_begun) async for current in one_ahead(rounds())]
    assert begun == [(0, 2), (1, 3), (2, 4), (3, 4)]


async def test_a_consumer_that_is_slow_stops_the_rounds_after_one() -> None:
    rounds = Rounds(9)
    async with aclosing(one_ahead(rounds())) as coming:
        assert number(await anext(coming)) == 0
        for _ in range(50):
            await asyncio.sleep(0)
        assert rounds.num_begun == 2
        assert number(await anext(coming)) == 1
        assert rounds.num_begun == 3


@pytest.mark.parametrize("error", [UnavailableError("lost"), ValueError("defect"), asyncio.CancelledError()])
@pytest.mark.parametrize("ahead", [one_ahead, buffered])
async def test_an_error_comes_after_the_rounds_before_it(
    ahead: Callable[[AsyncGenerator[Round]], AsyncGenerator[Round]], error: BaseException
) -> None:
    async with aclosing(ahead(Rounds(3, error)())) as coming:
        assert [number(await anext(coming)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error)):
            await anext(coming)


async def test_leaving_ends_the_round_under_way_first() -> None:
    rounds = Rounds(9)

    async def hanging() -> AsyncGenerator[Round]:
        async with aclosing(rounds()) as inner:
            async for current in inner:
                yield current
                await asyncio.Event().wait()

    async with aclosing(one_ahead(hanging())) as coming:
        await anext(coming)
        assert not rounds.closed.is_set()
    assert rounds.closed.is_set()


async def test_cancelling_the_consumer_ends_the_rounds() -> None:
    rounds = Rounds(1)

    async def endless() -> AsyncGenerator[Round]:
        async for current in rounds():
            yield current
        await asyncio.Event().wait()

    async def consume() -> None:
        async with aclosing(one_ahead(endless())) as coming:
            async for _ in coming:
                pass

    before = asyncio.all_tasks()
    consumer = asyncio.ensure_future(consume())
    await rounds.closed.wait()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert asyncio.all_tasks() == before


async def test_what_is_buffered_is_made_whether_it_is_taken_or_not() -> None:
    rounds = Rounds(9)
    async with aclosing(buffered(rounds())) as coming:
        assert number(await anext(coming)) == 0
        await asyncio.wait_for(rounds.closed.wait(), 10)
        assert rounds.num_begun == 9
        assert [number(current) async for current in coming] == list(range(1, 9))


async def test_what_is_buffered_ends_with_its_consumer() -> None:
    rounds = Rounds(10**9)
    async with aclosing(buffered(rounds())) as coming:
        await anext(coming)
    assert rounds.closed.is_set()
    num_begun = rounds.num_begun
    await asyncio.sleep(0.01)
    assert rounds.num_begun == num_begun
