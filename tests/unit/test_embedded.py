"""The embedded model where it can be neither read nor made."""

from __future__ import annotations

import pytest

from specdec.contract.errors import UnavailableError
from specdec.models.embedded import prepare_default_model


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE_DIR", "/proc/no-such-directory")
    with pytest.raises(UnavailableError, match=r"/proc/no-such-directory.*SPECDEC_CACHE_DIR"):
        prepare_default_model()
