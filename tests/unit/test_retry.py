"""When those who find no room are told to try again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from specdec.contract.retry import Progress, retry_after_s

# Seconds since the begin, tokens made, tokens left, room.
FAST, SLOW, NEW = (10.0, 100, 50, 1), (10.0, 10, 20, 1), (10.0, 0, 20, 1)
"""They should end in 5 s, in 20 s, and nobody knows when."""
DONE = (10.0, 20, 0, 1)


@pytest.mark.parametrize(
    ("running", "wanted", "expected"),
    [
        ([], 1, 1),
        ([NEW, NEW], 1, 1),
        ([SLOW, FAST], 1, 6),
        ([SLOW, FAST], 2, 21),
        ([SLOW, FAST, NEW], 3, 60),
        ([NEW, FAST], 1, 6),
        ([DONE, SLOW], 1, 1),
        ([(10.0, 1000, 1, 1)], 1, 1),
        ([(10.0, 1, 1000, 1)], 1, 60),
        ([(10.0, 100, 50, 64), (10.0, 10, 20, 640)], 64, 6),
        ([(10.0, 100, 50, 64), (10.0, 10, 20, 640)], 65, 21),
        ([FAST], 2, 60),
    ],
)
def test_when_room_should_be_free(
    running: Sequence[tuple[float, int, int, int]], wanted: int, expected: float
) -> None:
    now = time.monotonic()
    progress = [Progress(now - age, done, left, room) for age, done, left, room in running]
    # Time goes on between the two readings of the clock: 5.0001 s are 6 whole seconds.
    assert retry_after_s(progress, wanted) == expected
