"""One process of a kind is killed, ended or stopped under load: no answer fails, and none is another one.

A gateway that is lost takes the answers it streams along. Their readers get an error, and soon.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest

from specdec.contract.errors import UnavailableError
from tests.drills.fleet import NUM_TOKENS, Fleet, Session, new_sessions, run_sessions

KINDS = ("drafter", "verifier", "gateway")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
LONGEST_PAUSE_S = 10.0
"""Of an answer that goes on elsewhere: it takes 4.5 s to notice a process that stands still."""


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path, noisy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tiny_llama, noisy_llama, tmp_path_factory.mktemp("drills") / "logs") as running:
        yield running


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(kind, number, marks=pytest.mark.slow if number == signal.SIGSTOP else pytest.mark.drill)
        for kind, number in product(KINDS, SIGNALS)
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
async def test_a_process_is_lost_under_load(kind: str, number: signal.Signals, fleet: Fleet) -> None:
    await fleet.serve()
    expected = await fleet.undisturbed()
    assert [len(session.token_ids) for session in expected] == [NUM_TOKENS] * len(expected)

    sessions = new_sessions()
    lost_at = 0.0

    def lose() -> None:
        nonlocal lost_at
        lost_at = time.monotonic()
        fleet.signal(f"{kind}-0", number)

    await run_sessions(sessions, fleet.gateways, lose)
    took_s = time.monotonic() - lost_at
    failed = [session for session in sessions if session.error]
    told = f"pauses of {pauses(sessions)} ms, else {pauses(expected)} ms"
    print(f"{kind} {number.name}: {told}, {len(failed)} failed")

    may_fail = sessions[::2] if kind == "gateway" and number != signal.SIGTERM else []
    assert all(session in may_fail for session in failed), [session.error for session in failed]
    assert bool(failed) == bool(may_fail)
    for session in failed:
        assert isinstance(session.error, UnavailableError)
        assert took_s < 15
    for before, after in zip(expected, sessions, strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert after in failed or len(after.token_ids) == NUM_TOKENS
        assert after.pause_s < LONGEST_PAUSE_S
    if kind == "verifier" and number != signal.SIGTERM:
        assert any(session.num_failovers for session in sessions)


def pauses(sessions: Sequence[Session]) -> str:
    """Return the median and the longest of the sessions' longest pauses, milliseconds."""
    longest = sorted(round(1000 * session.pause_s) for session in sessions)
    return f"{longest[len(longest) // 2]} (median) to {longest[-1]}"
