from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.hostile.scene import Honest
from tests.systems import running_drafter, running_verifier


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def honest(tiny_llama: Path) -> AsyncIterator[Honest]:
    async with (
        running_verifier(tiny_llama) as (verifier_at, verifier),
        running_drafter(f"model=causal-lm:{tiny_llama}") as (drafter_at, _),
    ):
        yield Honest(tiny_llama, verifier_at, verifier, drafter_at)
