from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.world import World, running_world


@pytest.fixture(scope="module")
def world(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Run a system for the tests of a module."""
    with running_world(tiny_llama, tmp_path_factory.mktemp("shared")) as world:
        yield world
