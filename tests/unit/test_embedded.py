"""The embedded model: where it can be neither read nor made, and where two want to make it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from specdec.contract.errors import UnavailableError
from specdec.models.embedded import _locked, prepare_default_model


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE_DIR", "/proc/no-such-directory")
    with pytest.raises(UnavailableError, match=r"/proc/no-such-directory.*SPECDEC_CACHE_DIR"):
        prepare_default_model()


def test_one_process_at_a_time_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "model.lock"
    path.touch()
    with path.open() as other:
        with _locked(path), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
