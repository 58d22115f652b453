"""Names of methods: a drafter, several drafters that guess side by side, or none."""

from __future__ import annotations

from collections.abc import Sequence

PLAIN = "none"
"""Plain decoding: no drafter, K = 0."""
_SEPARATOR = "+"
"""Between the drafters of a method that merges their proposals; no drafter's name contains it."""


def drafters_of(method: str) -> tuple[str, ...]:
    """The drafters a method names, none for plain decoding."""
    return () if method == PLAIN else tuple(method.split(_SEPARATOR))


def method_of(drafters: Sequence[str]) -> str:
    """The method that merges these drafters' proposals; with none, plain decoding."""
    return _SEPARATOR.join(drafters) if drafters else PLAIN
