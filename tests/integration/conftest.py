from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gateway.rounds import merging
from tests.exposition import Exposition, expose_everything
from tests.refusals import small_system
from tests.systems import System


@pytest.fixture(autouse=True)
def patient_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make merging wait longer: a draft may take many times as long as usual on a busy machine, which these
    tests do not examine.
    """
    monkeypatch.setattr(merging, "_LEAST_PATIENCE_S", 5.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tiny_llama: Path) -> AsyncIterator[System]:
    """Run all services over a pool smaller than the model's context, for a module's `shared` tests."""
    async with small_system(tiny_llama) as system:
        yield system


@pytest.fixture(scope="session")
def exposition(tiny_llama: Path, noisy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exposition:
    """Return what services expose once every kind of request was made."""
    return asyncio.run(expose_everything(tiny_llama, noisy_llama, tmp_path_factory.mktemp("shared")))
