"""How long idle OpenMP threads spin goes by the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.service import tuning


@pytest.mark.parametrize(("vendor", "count"), [("GenuineIntel", "10000"), ("AuthenticAMD", "2000")])
def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch, vendor: str, count: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    assert tuning.spin_count() == count


def test_without_a_description_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    assert tuning.spin_count() == "10000"
