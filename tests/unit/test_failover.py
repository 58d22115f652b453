"""A verifier session that outlives its verifier, over sessions made up: who is asked, leased and closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Self

import pytest
import pytest_asyncio

from gateway.replicas import failover
from gateway.replicas import replica as replica_module
from gateway.replicas.failover import LastingVerifierSession, VerifierReplica
from gateway.replicas.replica import Replica
from gateway.replicas.replica_set import ReplicaSet
from gateway.request.peers import OTHER_WEIGHTS, is_same_model
from gateway.rounds.vocabulary import Verified
from specdec.contract.errors import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
)
from specdec.v1.common_pb2 import ModelInfo
from specdec.v1.verifier_pb2 import VerifierServiceGetInfoResponse

PROMPT = [1, 2]
LOST = UnavailableError("it was lost")
FULL = ResourceExhaustedError("every slot is taken")


class Session:
    """Emits one token after the other: 10, 11, ... It fails as told, in opening or in its first round."""

    def __init__(self, world: World, uri: str, committed: Sequence[int]) -> None:
        self.world, self.uri, self.committed = world, uri, list(committed)
        self.failure = world.failures.pop(0) if world.failures else None
        self.num_closed = 0

    async def __aenter__(self) -> Self:
        assert not any(other.is_open for other in self.world.sessions), "the lost one is closed first"
        self.world.sessions.append(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.num_closed += 1

    @property
    def is_open(self) -> bool:
        return not self.num_closed

    async def open(self, traceparent: str) -> Verified:
        if self.failure:
            raise self.failure
        return Verified(0, 10 + len(self.committed))

    async def verify(
        self,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        traceparent: str,
        parent_indices: Sequence[int] = (),
    ) -> Verified:
        if self is self.world.sessions[0]:
            raise self.world.end_of_first
        return Verified(len(draft_token_ids), 99)


class World:
    """Two replicas; the first loses its session in the first round, and the second takes it over.

    Args:
        failures: of the sessions in the order they are made; None: it opens.
    """

    def __init__(self, failures: Sequence[SpecdecError | None] = ()) -> None:
        self.failures = list(failures)
        self.sessions: list[Session] = []
        self.lost: list[str] = []
        self.num_picked = 0
        self.num_preempted = 0
        self.end_of_first: SpecdecError = LOST
        """What the first session's first round raises."""
        self.refusals: list[str] = []
        self.ran_on: list[str] = []
        self.waited_with: list[list[int]] = []
        """What was committed whenever it waited for its turn."""
        self.first: VerifierReplica = Replica("127.0.0.1:1", "")
        self.second: VerifierReplica = Replica("127.0.0.1:2", "")

    def pick(self, *, without: Collection[VerifierReplica] = ()) -> VerifierReplica:
        if self.second in without:
            raise UnavailableError("nobody is there", reason="NO_REPLICA")
        self.num_picked += 1
        return self.second

    def session(self, *, wait_s: float = 20.0) -> LastingVerifierSession:
        return LastingVerifierSession(
            self.first.lease(),
            lambda replica, committed: Session(self, replica.uri, committed),
            self.pick,
            prompt_token_ids=PROMPT,
            wait_s=wait_s,
            owner=self,
        )

    def runs_on(self, replica: VerifierReplica) -> None:
        self.ran_on.append(replica.uri)

    def lost_verifier(self, reason: str) -> None:
        self.lost.append(reason)

    def was_preempted(self) -> None:
        self.num_preempted += 1

    async def turn_again(self, refusal: SpecdecError, committed_token_ids: Sequence[int]) -> None:
        assert not any(session.is_open for session in self.sessions), "nothing is held while it waits"
        self.refusals.append(refusal.reason)
        self.waited_with.append(list(committed_token_ids))

    def assert_all_is_given_back(self) -> None:
        assert [session.num_closed for session in self.sessions] == [1] * len(self.sessions)
        assert (self.first.num_sessions, self.second.num_sessions) == (0, 0)


@pytest_asyncio.fixture
async def make_world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., World]]:
    monkeypatch.setattr(failover, "_RETRY_S", 0.01)
    worlds: list[World] = []

    def make(*failures: SpecdecError | None) -> World:
        worlds.append(World(failures))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.first.close()
        await world.second.close()


async def test_a_lost_replica_that_still_looks_ready_is_not_taken_where_there_is_another(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()

    def pick(*, without: Collection[VerifierReplica] = ()) -> VerifierReplica:
        return next(replica for replica in (world.first, world.second) if replica not in without)

    monkeypatch.setattr(world, "pick", pick)
    async with world.session() as session:
        await session.open("")
        await session.verify(len(PROMPT) + 1, (1,), "")
    assert [session.uri for session in world.sessions] == [world.first.uri, world.second.uri]
    world.assert_all_is_given_back()


async def test_who_takes_a_session_over_is_leased_and_told_what_was_committed(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    async with world.session() as session:
        assert (await session.open("")).bonus_token_id == 12
        assert (world.first.num_sessions, world.second.num_sessions) == (1, 0)
        taken_over = await session.verify(3, [7, 8], "")
        assert (taken_over.num_accepted_tokens, taken_over.bonus_token_id) == (0, 13)
        assert (world.first.num_sessions, world.second.num_sessions) == (0, 1)
        await session.verify(4, [5, 6], "")
        assert [session.committed for session in world.sessions] == [[1, 2], [1, 2, 12]]
        assert [session.uri for session in world.sessions] == ["127.0.0.1:1", "127.0.0.1:2"]
        assert [session.is_open for session in world.sessions] == [False, True]
    assert world.lost == ["it was lost"]
    assert world.ran_on == ["127.0.0.1:1", "127.0.0.1:2"]
    world.assert_all_is_given_back()


async def test_who_is_full_or_lost_as_well_is_asked_again(make_world: Callable[..., World]) -> None:
    world = make_world(None, FULL, UnavailableError("lost again"), FULL, None)
    async with world.session() as session:
        await session.open("")
        assert (await session.verify(3, [], "")).bonus_token_id == 13
        assert (world.num_picked, world.second.num_sessions) == (4, 1)
    assert world.lost == ["it was lost"], "one loss, however often somebody was asked"
    world.assert_all_is_given_back()


async def test_a_session_that_never_opened_is_taken_over_as_well(make_world: Callable[..., World]) -> None:
    world = make_world(LOST)
    async with world.session() as session:
        assert (await session.open("")).bonus_token_id == 12
        assert [session.committed for session in world.sessions] == [PROMPT, PROMPT]
    world.assert_all_is_given_back()


@pytest.mark.parametrize("wait_s", [0.0, 0.2])
async def test_where_nobody_takes_it_in_time_the_loss_is_told(
    wait_s: float, make_world: Callable[..., World]
) -> None:
    world = make_world(None, *[FULL] * 1000)
    async with world.session(wait_s=wait_s) as session:
        await session.open("")
        with pytest.raises(UnavailableError, match="it was lost"):
            await session.verify(3, [], "")
    assert world.num_picked == 1 if wait_s == 0 else 2 <= world.num_picked <= 20
    world.assert_all_is_given_back()


async def test_a_broken_replica_is_asked_once_for_a_lost_session(make_world: Callable[..., World]) -> None:
    world = make_world(None, InternalError("a defect"), None)
    async with world.session(wait_s=0.1) as session:
        await session.open("")
        with pytest.raises(UnavailableError, match="it was lost nobody is there"):
            await session.verify(3, [], "")
    assert world.num_picked == 1
    world.assert_all_is_given_back()


@pytest.mark.parametrize("error", [InternalError("a defect"), FULL])
async def test_who_is_broken_or_full_sends_a_session_elsewhere(
    error: SpecdecError, make_world: Callable[..., World]
) -> None:
    world = make_world(error, None)
    async with world.session() as session:
        assert (await session.open("")).bonus_token_id == 12
        assert (world.first.num_sessions, world.second.num_sessions) == (0, 1)
    assert world.lost == ([error.message] if isinstance(error, InternalError) else [])
    world.assert_all_is_given_back()
    both = make_world(error, FailedPreconditionError("another"), None)
    async with both.session() as session:
        with pytest.raises(FailedPreconditionError, match="another"):
            await session.open("")
    alone = make_world(error, error)
    async with alone.session() as session:
        with pytest.raises(type(error), match=error.message):
            await session.open("")
    assert alone.num_picked == 1
    alone.assert_all_is_given_back()


PREEMPTED = AbortedError("older ones need it", reason="SESSION_PREEMPTED")
FULL_POOL = ResourceExhaustedError("no KV", reason="KV_POOL_FULL")


async def test_a_preempted_session_goes_on_elsewhere_at_once(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.end_of_first = PREEMPTED
    async with world.session() as session:
        await session.open("")
        taken_over = await session.verify(3, [7, 8], "")
        assert (taken_over.num_accepted_tokens, taken_over.is_reopened) == (0, True)
        assert [session.uri for session in world.sessions] == ["127.0.0.1:1", "127.0.0.1:2"]
        assert not (await session.verify(4, [5], "")).is_reopened
    assert (world.num_preempted, world.refusals, world.lost) == (1, [], [])
    assert not world.first.rests
    world.assert_all_is_given_back()


async def test_where_nobody_has_room_a_preempted_session_waits_for_its_turn(
    make_world: Callable[..., World],
) -> None:
    # The other one is full; at its turn it is full again, and then preempts the session while it opens.
    world = make_world(None, FULL_POOL, FULL_POOL, PREEMPTED, FULL_POOL, None)
    world.end_of_first = PREEMPTED
    async with world.session() as session:
        await session.open("")
        assert (await session.verify(3, [], "")).bonus_token_id == 13
        assert [session.committed for session in world.sessions[1:]] == [[1, 2, 12]] * 5
    assert world.num_preempted == 2
    assert world.ran_on == ["127.0.0.1:1", "127.0.0.1:2"], "only who opened the session has it"
    assert world.refusals == ["KV_POOL_FULL", "KV_POOL_FULL", "SESSION_PREEMPTED", "KV_POOL_FULL"]
    assert world.waited_with == [[1, 2, 12]] * 4
    assert not world.lost
    world.assert_all_is_given_back()


TOO_SMALL = InvalidArgumentError("larger than the pool", reason="EXCEEDS_KV_POOL")


async def test_a_preempted_session_that_fits_nowhere_ends(make_world: Callable[..., World]) -> None:
    """The verifier that it ran on is gone, but may be back; the other one is too small."""
    world = make_world(None, *[TOO_SMALL] * 9)
    world.end_of_first = PREEMPTED
    async with world.session(wait_s=0.1) as session:
        await session.open("")
        with pytest.raises(UnavailableError):
            await session.verify(3, [], "")
    assert len(world.refusals) <= 1
    assert len(world.sessions) <= 3, "who is too small is not asked again and again"
    world.assert_all_is_given_back()


async def test_a_lost_session_passes_by_who_is_too_small(make_world: Callable[..., World]) -> None:
    world = make_world(None, TOO_SMALL, None)
    async with world.session(wait_s=0.1) as session:
        await session.open("")
        with pytest.raises(UnavailableError, match="it was lost nobody is there"):
            await session.verify(3, [], "")
    assert world.num_picked == 1
    world.assert_all_is_given_back()


@pytest.mark.parametrize("error", [LOST, InternalError("a defect")])
async def test_a_preempted_session_may_be_lost_as_any_other(
    error: SpecdecError, make_world: Callable[..., World]
) -> None:
    world = make_world(None, error, None)
    world.end_of_first = PREEMPTED
    async with world.session(wait_s=1.0) as session:
        await session.open("")
        if error is LOST:
            assert (await session.verify(3, [], "")).bonus_token_id == 13
        else:
            with pytest.raises(InternalError):
                await session.verify(3, [], "")
    assert (world.num_preempted, len(world.lost)) == (1, int(error is LOST))
    world.assert_all_is_given_back()


async def test_a_full_replica_has_the_last_word_on_a_session_that_never_opened(
    make_world: Callable[..., World],
) -> None:
    """It takes the session later, which the others never do."""
    full = ResourceExhaustedError("no slot", reason="NO_SESSION_SLOT")
    too_small = InvalidArgumentError("it never fits", reason="EXCEEDS_KV_POOL")
    for first, second in (
        (full, too_small),
        (too_small, full),
        (InternalError("a defect"), full),
        (LOST, full),
    ):
        world = make_world(first, second)
        async with world.session() as session:
            with pytest.raises(ResourceExhaustedError) as raised:
                await session.open("")
        assert raised.value is full
        world.assert_all_is_given_back()
    nowhere = make_world(too_small, too_small)
    async with nowhere.session() as session:
        with pytest.raises(InvalidArgumentError):
            await session.open("")
    nowhere.assert_all_is_given_back()


async def test_a_running_answer_waits_for_room_where_its_verifier_breaks_and_the_others_are_full(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ResourceExhaustedError("no slot", reason="NO_SESSION_SLOT")
    world = make_world(None, full, full, None)
    await _break_first(world, monkeypatch)
    async with world.session() as session:
        await session.open("")
        assert (await session.verify(3, [], "")).bonus_token_id == 13
    assert [session.uri for session in world.sessions] == ["127.0.0.1:1", *["127.0.0.1:2"] * 3]
    assert world.lost == ["a defect"], "one loss, however often somebody was asked"
    world.assert_all_is_given_back()


@pytest.mark.parametrize("wait_s", [0.0, 0.2])
async def test_a_running_answer_that_finds_no_room_in_time_ends_with_the_defect(
    wait_s: float, make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ResourceExhaustedError("no slot", reason="NO_SESSION_SLOT")
    world = make_world(None, *[full] * 1000)
    await _break_first(world, monkeypatch)
    async with world.session(wait_s=wait_s) as session:
        await session.open("")
        with pytest.raises(InternalError, match="a defect"):
            await session.verify(3, [], "")
    assert world.num_picked == 1 if wait_s == 0 else 2 <= world.num_picked <= 20
    world.assert_all_is_given_back()


async def _break_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first round of the first session meet a defect, and not a loss."""

    async def verify(session: Session, *_: object) -> Verified:
        if session is world.sessions[0]:
            raise InternalError("a defect")
        return Verified(0, 99)

    monkeypatch.setattr(Session, "verify", verify)


async def test_a_replica_rests_for_longer_with_every_error_in_a_row(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(replica_module, "time", SimpleNamespace(monotonic=lambda: now))
    replica = make_world().first
    rests = []
    for _ in range(12):
        replica.failed()
        begun = now
        while replica.rests:
            now += 0.5
        rests.append(now - begun)
    assert rests == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    replica.failed()
    replica.succeeded()
    assert not replica.rests
    replica.failed()
    assert not replica.rests, "the errors are no longer in a row"


async def test_what_another_try_would_meet_again_is_told_at_once(make_world: Callable[..., World]) -> None:
    error = FailedPreconditionError("another vocabulary")
    world = make_world(None, error, None)
    async with world.session() as session:
        await session.open("")
        with pytest.raises(type(error), match=error.message):
            await session.verify(3, [], "")
    assert world.num_picked == 1
    world.assert_all_is_given_back()


async def test_who_gives_up_waiting_leaves_nothing_behind(make_world: Callable[..., World]) -> None:
    world = make_world(None, *[FULL] * 10_000)

    async def generate() -> None:
        async with world.session() as session:
            await session.open("")
            await session.verify(3, [], "")

    waiting = asyncio.create_task(generate())
    async with asyncio.timeout(20):
        while world.num_picked < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert world.second.num_sessions == 1
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
    world.assert_all_is_given_back()


async def test_the_error_says_why_no_replica_goes_on(make_world: Callable[..., World]) -> None:
    world = make_world(None)

    def refuse(**_: object) -> VerifierReplica:
        raise UnavailableError("No replica: 127.0.0.1:2 runs another revision.", reason="NO_REPLICA")

    world.pick = refuse  # type: ignore[method-assign]
    async with world.session(wait_s=0) as session:
        await session.open("")
        with pytest.raises(UnavailableError, match=r"^it was lost No replica: 127\.0\.0\.1:2 runs another"):
            await session.verify(3, [], "")
    world.assert_all_is_given_back()


@pytest.mark.parametrize("revision", ["other", "same"])
async def test_a_ready_verifier_of_other_weights_is_named_as_such(revision: str) -> None:
    async def get_info(_: object) -> None: ...

    verifiers: ReplicaSet[VerifierServiceGetInfoResponse] = ReplicaSet(
        "specdec.v1.VerifierService", ["127.0.0.1:1"], get_info=get_info, check=lambda _: None
    )
    ready = verifiers.replicas[0]
    ready.reason, ready.info = "", VerifierServiceGetInfoResponse(model=ModelInfo(revision=revision))
    try:
        suits = partial(is_same_model, ModelInfo(revision="same"))
        if revision == "same":
            assert verifiers.pick(suits, unsuited=OTHER_WEIGHTS) is ready
        else:
            with pytest.raises(
                UnavailableError, match=r"127\.0\.0\.1:1: it is ready, but runs another model"
            ):
                verifiers.pick(suits, unsuited=OTHER_WEIGHTS)
    finally:
        await verifiers.close()
