"""Which cases of a parametrised test the quick run leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_only(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return the cases; those not in `quick` are marked slow, and `make test-all` alone runs them.

    The quick ones must between them reach every branch that the others reach.
    """
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
