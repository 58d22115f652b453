"""Work that goes on before its last result is dealt with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from gateway.rounds.vocabulary import Round

_Item = TypeVar("_Item")
_NUM_TURNS = 2
"""How many turns of the event loop the next round gets before the consumer of the last one goes on: several
drafters are asked in the second turn after a round begins."""


async def one_ahead(rounds: AsyncGenerator[Round]) -> AsyncGenerator[Round]:
    """Yield the rounds, each of them when the request of the next one is on its way.

    The text, the statistics and the message of a round take time in the gateway; the services work on the
    next round meanwhile. A round begins only when the consumer has dealt with the last but one. A round under
    way ends with this generator.
    """
    ready: asyncio.Queue[Round | None] = asyncio.Queue()
    room = asyncio.Semaphore(1)
    running = asyncio.ensure_future(_run(rounds, ready, room))
    running.add_done_callback(lambda _: ready.put_nowait(None))
    try:
        while current := await ready.get():
            for _ in range(_NUM_TURNS):
                await asyncio.sleep(0)
            yield current
            room.release()
        running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _run(
    rounds: AsyncGenerator[Round], ready: asyncio.Queue[Round | None], room: asyncio.Semaphore
) -> None:
    async for current in rounds:
        ready.put_nowait(current)
        await room.acquire()


async def buffered(items: AsyncGenerator[_Item]) -> AsyncGenerator[_Item]:
    """Yield the items, all of which are made as fast as they can be, whenever the consumer takes them.

    So nothing that is held while items are made is held for a consumer that is slow. The items end with this
    generator, and an error comes after the items before it.
    """
    ready: asyncio.Queue[tuple[_Item] | None] = asyncio.Queue()
    making = asyncio.ensure_future(_make(items, ready))
    making.add_done_callback(lambda _: ready.put_nowait(None))
    try:
        while item := await ready.get():
            yield item[0]
        making.result()
    finally:
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)


async def _make(items: AsyncGenerator[_Item], ready: asyncio.Queue[tuple[_Item] | None]) -> None:
    async with aclosing(items):
        async for item in items:
            ready.put_nowait((item,))
