"""A drafter that waits until a test lets it go on: it holds a request in mid-stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem
from drafter_service.families import FAMILIES, DrafterFactory, DrafterSpec
from specdec.client import AsyncClient
from tests.systems import System, running_system

WAIT_S = 20.0


class Gate:
    """Closed at first. `families` has the drafter family "gated" besides the real ones."""

    def __init__(self) -> None:
        self._may_pass = threading.Event()
        self._reached = threading.Event()
        self.families: Mapping[str, DrafterFactory] = {**FAMILIES, "gated": self._make}

    def _make(self, spec: DrafterSpec, config: DrafterConfig) -> Drafter:
        return _GatedDrafter(spec.name, self._reached, self._may_pass)

    async def reached(self) -> None:
        """Return once a request waits at the gate."""
        assert await asyncio.to_thread(self._reached.wait, WAIT_S), "no request came to the gate"

    def open(self) -> None:
        """Let every request pass from now on."""
        self._may_pass.set()


class _GatedDrafter(Drafter):
    """Has no guess, and takes its time to say so."""

    def __init__(self, name: str, reached: threading.Event, may_pass: threading.Event) -> None:
        self.traits = DrafterTraits(name, "gated", 8, 2)
        self._reached = reached
        self._may_pass = may_pass

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        self._reached.set()
        self._may_pass.wait(WAIT_S)
        return [[] for _ in items]


@asynccontextmanager
async def gated_system(model: Path, **options: Any) -> AsyncIterator[tuple[System, Gate]]:
    """Run all three services with the drafters "ngram" and "gated"; yield them and the gate of the latter."""
    gate = Gate()
    gateway_options = {"draft_timeout_s": WAIT_S, **options.pop("gateway_options", {})}
    async with running_system(
        model, "ngram", "gated", families=gate.families, gateway_options=gateway_options, **options
    ) as system:
        try:
            yield system, gate
        finally:
            gate.open()


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Return once the condition holds; fail if it does not for long."""
    async with asyncio.timeout(WAIT_S):
        while True:
            outcome = condition()
            if outcome if isinstance(outcome, bool) else await outcome:
                return
            await asyncio.sleep(0.01)


async def eventually_offers(client: AsyncClient, *methods: str) -> None:
    """Return once the gateway knows these drafters."""

    async def are_there() -> bool:
        return set(methods) <= set((await client.info()).methods)

    await eventually(are_there)
