"""What waits to be sent on a call that many sessions share: what is there at a time goes in one message."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from google.protobuf.message import Message

from specdec.contract.errors import ResourceExhaustedError
from specdec.transport.channel import MAX_MESSAGE_BYTES

MESSAGE_BYTES = 256 * 1024
"""Items share a message up to this size; a larger item has one of its own."""
MAX_ITEM_BYTES = MAX_MESSAGE_BYTES - 1024
"""Largest item: a message that the peer refuses would end the call, and with it the sessions of others."""
MAX_WAITING = 1024
"""From so many items on, the peer does not read, and nothing more should be made for it."""

ItemT = TypeVar("ItemT", bound=Message)


class Outbox(Generic[ItemT]):
    """Items in the order in which they are to be sent."""

    def __init__(self) -> None:
        self._items: deque[tuple[ItemT, int]] = deque()
        self._filled, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_room.set()
        self._is_closed = False

    def put(self, item: ItemT) -> None:
        """Add an item. After `close` nothing is sent any more, and it is dropped.

        Raises:
            ResourceExhaustedError: it is larger than what the peer takes.
        """
        num_bytes = item.ByteSize()
        if num_bytes > MAX_ITEM_BYTES:
            raise ResourceExhaustedError(
                f"A message of a session has {num_bytes} bytes, but at most {MAX_ITEM_BYTES} are taken.",
                reason="MESSAGE_TOO_LARGE",
            )
        if not self._is_closed:
            self._items.append((item, num_bytes))
            self._filled.set()
            if len(self._items) >= MAX_WAITING:
                self._has_room.clear()

    def close(self) -> None:
        """Say that nothing more comes."""
        self._is_closed = True
        self._filled.set()

    async def room(self) -> None:
        """Wait until what was put has been taken, but for some."""
        await self._has_room.wait()

    async def take(self) -> list[ItemT]:
        """Wait for items and return those of the next message; none: the outbox is closed and empty."""
        await self._filled.wait()
        taken: list[ItemT] = []
        size = 0
        while self._items and (not taken or size + self._items[0][1] <= MESSAGE_BYTES):
            item, num_bytes = self._items.popleft()
            taken.append(item)
            size += num_bytes
        if not self._items and not self._is_closed:
            self._filled.clear()
        if len(self._items) < MAX_WAITING:
            self._has_room.set()
        return taken
