"""A step of the target model: what fails on its own fails alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from specdec.contract.errors import InternalError, NotFoundError
from verifier_service.target_model import SideWork, TargetModel


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyError("weight"), ValueError(), NotFoundError("no")]
)
def test_side_work_that_fails_fails_alone(error: Exception) -> None:
    def fail() -> NoReturn:
        raise error

    packed: Any = SimpleNamespace(vocab_size=8, device=torch.device("cpu"))
    before, failed, after = TargetModel(packed).step(
        [SideWork(lambda: 1), SideWork(fail), SideWork(lambda: 2)]
    )
    assert (before, after) == (1, 2)
    if isinstance(error, NotFoundError):
        assert failed is error
    else:
        assert isinstance(failed, InternalError)
        assert type(error).__name__ in failed.message
