from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from specdec.service.logs import quiet_grpc
from specdec.service.tuning import tune_process
from tests.leftovers import nothing_left
from tests.tiny_models import save_tiny_model

tune_process()
quiet_grpc()
torch.set_num_threads(1)  # tiny models gain nothing from a second thread
# How long an example takes says how busy the machine is; speed is measured by benchmarks.
settings.register_profile("specdec", deadline=None)
settings.load_profile("specdec")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def noisy_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny Llama with noise on its weights: a drafter that is right now and then."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "noisy-llama", noise=0.05)


@pytest.fixture(scope="module", autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a module leaves nothing open, whatever its tests do, fail at or cancel."""
    if request.module.__name__.endswith("test_default_model"):
        yield  # the target's weights stay mapped until the collector has been at the drafters' models
        return
    with nothing_left():
        yield
