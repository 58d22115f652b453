"""Estimates: what they tell of a few observations."""

from __future__ import annotations

import pytest

from gateway.rounds.estimates import Curve


def test_a_curve_is_linear_between_what_it_saw_and_never_falls() -> None:
    curve = Curve()
    assert curve(5) == 0
    curve.add(1, 10)
    assert curve(1) == curve(50) == 10
    for size, value in ((9, 18), (33, 12)):
        curve.add(size, value)
    assert curve(0) == pytest.approx(9.375)
    assert curve(5) == pytest.approx(12.5)
    assert curve(33) == curve(100) == 15
    for _ in range(8):
        curve.add(9, 18)
        curve.add(33, 24)
    assert (curve(9), curve(33)) == (18, 24)
    rising = Curve(through_origin=True)
    rising.add(4, 8)
    assert [rising(k) for k in (0, 2, 8)] == [0, 4, 16]
