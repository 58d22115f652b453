"""Types of options that are numbers: every one has both bounds."""

from __future__ import annotations

import math
from typing import Any

import click

from specdec.contract.bounds import MAX_NUMBER


class _Numbers(click.FloatRange):
    """A range of numbers, which NaN is not in: it is neither less than a bound nor more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


def integers(low: int, high: int = MAX_NUMBER) -> click.IntRange:
    """Return the type of integers from `low` to `high`."""
    return click.IntRange(low, high)


def numbers(low: float, high: float = MAX_NUMBER, *, above: bool = False) -> click.FloatRange:
    """Return the type of numbers from `low`, or above it, to `high`."""
    return _Numbers(low, high, min_open=above)
