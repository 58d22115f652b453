from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.refusals import small_system
from tests.systems import System


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tiny_llama: Path) -> AsyncIterator[System]:
    """All services over a pool smaller than the model's context, for a module's `shared` tests."""
    async with small_system(tiny_llama) as system:
        yield system
