"""Estimates: what they tell of a few observations."""

from __future__ import annotations

import pytest

from gateway.rounds.estimates import Curve, Survival
from specdec.contract.step_costs import StepCosts


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


def test_a_line_tells_the_slope_and_is_hardly_moved_by_what_is_far_off() -> None:
    line = StepCosts(1 / 0.003, most_off=1.5, least_variance=0.25)
    assert line(5) == line.token_ns == 0
    line.add(8, 20)
    assert (line(100), line.token_ns) == (20, 0), "of one size it is not known what others take"
    for number in range(300):
        size = 8 + number % 40
        line.add(size, 20 + 0.5 * (size - 8))
    assert line.token_ns == pytest.approx(0.5, rel=0.01)
    assert line(100) == pytest.approx(66, rel=0.01)
    line.add(9, 400)
    assert line(9) == pytest.approx(20.5, rel=0.05)
    assert line.token_ns == pytest.approx(0.5, rel=0.05)


def test_a_line_follows_what_changes() -> None:
    line = StepCosts(1 / 0.003, most_off=1.5, least_variance=0.25)
    for factor in (1, 3):
        for number in range(2000):
            size = 1 + number % 16
            line.add(size, factor * (10 + size))
    assert line(16) == pytest.approx(78, rel=0.05)
    assert line.token_ns == pytest.approx(3, rel=0.1)


def test_acceptance_beyond_what_the_text_explains_is_what_counts() -> None:
    plain, freed = Survival(1.0), Survival(1.0)
    for number in range(100):
        accepted = 1 if number % 10 else 0
        plain.add(1, accepted)
        freed.add(1, accepted, [0.4])
    assert plain.rates(1, [0.0], 0.0) == pytest.approx([0.9])
    assert freed.rates(1, [0.0], 0.0) == pytest.approx([0.5])
    freed.add(1, 0, [100.0])
    assert freed.rates(1, [0.0], 0.0) == [0.0]
