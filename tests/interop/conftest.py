from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.integration.gated_drafter import Gate, gated_system
from tests.systems import System


@pytest_asyncio.fixture
async def gated(tiny_llama: Path) -> AsyncIterator[tuple[System, Gate]]:
    """Run all three services; a request whose method is "gated" is held in mid-stream."""
    async with gated_system(tiny_llama) as started:
        yield started


@pytest_asyncio.fixture
async def system(gated: tuple[System, Gate]) -> System:
    """Return all three services."""
    return gated[0]
