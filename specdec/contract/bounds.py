"""The bounds of numbers that people give: in requests, in options, in files."""

from __future__ import annotations

MAX_NUMBER = 2**31 - 1
"""Largest number that an option or a field takes, unless it has a bound of its own."""
MAX_UINT32 = 2**32 - 1
"""Largest value of the type that token ids have on the wire."""


def bound_passed(value: float, low: float, high: float, *, above: bool = False) -> str:
    """Return which bound a number passes, as what it must be: "at least 1"; empty: it passes none.

    Args:
        above: the number must be more than `low`.
    """
    if value < low or (above and value == low):
        return f"{'more than' if above else 'at least'} {low}"
    if value > high:
        return f"at most {high}"
    return "" if value == value else f"a number from {low} to {high}"
