"""A drafter that is slow, lost or wrong costs its drafts and nothing else; no session of its is leaked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest

from gateway.replicas.remote_state import RemoteState
from gateway.rounds.drafting import DraftLink, NoDrafts
from gateway.rounds.link_states import Lost
from gateway.rounds.records import NEVER_RIGHT, DrafterRecords, TrackRecord
from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSize
from specdec.contract.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    UnimplementedError,
)
from specdec.v1 import target_state_pb2, verifier_pb2

VOCAB_SIZE = 100
PROMPT = [1, 2, 3]
NEVER_S = 3600.0
FIRST = Draft((7, 8), is_first=True)
"""What a session's first round gets, unless told otherwise."""


@dataclass(frozen=True)
class State:
    """The target's state of one verifier session."""

    session_id: str
    cached_length: int = 3


def ask(
    committed_token_ids: Sequence[int],
    draft_depth: int,
    traceparent: str = "",
    draft_nodes: int = 0,
    state: State | None = None,
) -> DraftRequest:
    """Return what a round asks for."""
    return DraftRequest(committed_token_ids, DraftSize(draft_depth, draft_nodes), traceparent, state)


async def answer() -> Draft:
    """Return the draft that a drafter makes unless told otherwise."""
    return Draft((7, 8))


async def hang() -> Draft:
    """Never return."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def failing(error: SpecdecError) -> Callable[[], Awaitable[Draft]]:
    async def fail() -> Draft:
        raise error

    return fail


def drafting(*token_ids: int, parents: tuple[int, ...] = ()) -> Callable[[], Awaitable[Draft]]:
    async def draft() -> Draft:
        return Draft(token_ids, parent_indices=parents)

    return draft


class FakeSession:
    """Plays a script of answers, then keeps to the default."""

    reads_target_state = False

    def __init__(
        self,
        opened_with: Sequence[int],
        script: Sequence[Callable[[], Awaitable[Draft]]],
        record: TrackRecord,
    ) -> None:
        self.record = record
        self.opened_with = list(opened_with)
        self.script = list(script)
        self.rounds: list[tuple[list[int], int, int, str]] = []
        self.num_closed = 0

    async def propose(self, new_token_ids: Sequence[int], request: DraftRequest) -> Draft:
        length, size = len(request.committed_token_ids), request.size
        self.rounds.append((list(new_token_ids), length, size.draft_depth, request.traceparent))
        return await (self.script.pop(0) if self.script else answer)()

    async def close(self) -> None:
        self.num_closed += 1


class ReadingSession(FakeSession):
    """Reads the target's state."""

    reads_target_state = True


class FakeDrafters:
    """Hands out sessions: per attempt a script, or an error to refuse it with.

    `records` are of its replicas: a session is one on the first that is not left alone.
    """

    session_class = FakeSession

    def __init__(self, *attempts: Sequence[Callable[[], Awaitable[Draft]]] | Exception) -> None:
        self.attempts = list(attempts)
        self.records = [TrackRecord("ngram")]
        self.attempted_at: list[float] = []
        self.num_cancelled = 0
        self.sessions: list[FakeSession] = []
        self.may_open = asyncio.Event()
        self.may_open.set()

    @property
    def num_attempts(self) -> int:
        return len(self.attempted_at)

    async def connect(self, committed_token_ids: Sequence[int]) -> FakeSession:
        self.attempted_at.append(time.monotonic())
        attempt = self.attempts.pop(0) if self.attempts else ()
        try:
            await self.may_open.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if isinstance(attempt, Exception):
            raise attempt
        record = next((one for one in self.records if not one.is_paused), self.records[0])
        self.sessions.append(self.session_class(committed_token_ids, attempt, record))
        return self.sessions[-1]

    def link(
        self,
        *,
        timeout_s: float = 30.0,
        open_timeout_s: float = NEVER_S,
        retry_s: float = NEVER_S,
        may_pause: bool = True,
        opens_at_once: bool = True,
    ) -> DraftLink:
        return DraftLink(
            self.connect,
            PROMPT,
            vocab_size=VOCAB_SIZE,
            timeout_s=timeout_s,
            open_timeout_s=open_timeout_s,
            retry_s=retry_s,
            drafter="ngram",
            records=DrafterRecords(lambda: self.records),
            may_pause=may_pause,
            opens_at_once=opens_at_once,
        )

    def assert_all_closed_once(self) -> None:
        assert [session.num_closed for session in self.sessions] == [1] * len(self.sessions)


@pytest.fixture
async def no_stray_tasks() -> AsyncIterator[None]:
    """Check that no task goes on after a link was left."""
    yield
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "connect" in repr(task.get_coro())]


pytestmark = pytest.mark.usefixtures("no_stray_tasks")


def soon() -> asyncio.Timeout:
    """Bound the time of a block that must not wait for anything that hangs."""
    return asyncio.timeout(5)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0)


async def settled() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestADrafterThatJoinsLater:
    async def test_opens_and_reads_beside_the_rounds(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link(opens_at_once=False) as link:
            await settled()
            assert not drafters.num_attempts
            assert not link.is_open
            await link.join(ask([*PROMPT, 4], 0))
            await until(lambda: len(drafters.sessions) == 1)
            assert not link.is_open, "it has not read yet"
            await link.join(ask([*PROMPT, 4, 5], 0))
            await until(lambda: link.is_open)
            assert await link.propose(ask([*PROMPT, 4, 5, 6], 2)) == Draft((7, 8)), "its first is long past"
            (session,) = drafters.sessions
            assert session.opened_with == [*PROMPT, 4]
            assert [(new, depth) for new, _, depth, _ in session.rounds] == [([5], 1), ([6], 2)]
        drafters.assert_all_closed_once()

    async def test_one_that_never_opens_holds_nothing_up(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()
        async with soon(), drafters.link(opens_at_once=False) as link:
            for length in range(4, 8):
                await link.join(ask(range(length), 0))
                await settled()
                assert not link.is_open
        assert drafters.num_attempts == drafters.num_cancelled == 1

    async def test_one_that_fails_is_left_alone_for_a_while(self) -> None:
        drafters = FakeDrafters(UnavailableError("gone"), [failing(InternalError("broken"))])
        async with drafters.link(opens_at_once=False, retry_s=0.02) as link:
            for _ in range(3):
                await link.join(ask([*PROMPT, 4], 0))
                await settled()
            assert drafters.num_attempts == 1, "the pause is not over"
            await asyncio.sleep(0.03)
            async with soon():
                while not link.is_open:
                    await link.join(ask([*PROMPT, 4], 0))
                    await asyncio.sleep(0.005)
            assert drafters.num_attempts == 2
            failed = await link.propose(ask([*PROMPT, 4], 2))
            assert failed.fallback_reason == "broken", "how it failed is found when it is asked"
            assert not link.is_open
        drafters.assert_all_closed_once()

    async def test_one_that_is_never_right_does_not_join(self) -> None:
        drafters = FakeDrafters()
        for _ in range(40):
            drafters.records[0].judge(is_right=False)
        async with drafters.link(opens_at_once=False) as link:
            await link.join(ask([*PROMPT, 4], 0))
            await settled()
            assert not link.is_open
        assert not drafters.num_attempts


class TestAWorkingDrafter:
    async def test_sends_what_was_committed_since_the_last_round(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link() as link:
            assert await link.propose(ask([*PROMPT, 4], 2, "a")) == FIRST
            assert await link.propose(ask([*PROMPT, 4, 7, 9], 3, "b")) == Draft((7, 8))
            (session,) = drafters.sessions
            assert session.opened_with == PROMPT
            assert session.rounds == [([4], 4, 2, "a"), ([7, 9], 6, 3, "b")]
        drafters.assert_all_closed_once()

    async def test_opens_beside_the_prefill(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link():
            await until(lambda: bool(drafters.sessions))
        drafters.assert_all_closed_once()

    async def test_an_empty_draft_is_no_failure(self) -> None:
        drafters = FakeDrafters([drafting()])
        async with drafters.link() as link:
            assert await link.propose(ask(PROMPT, 2)) == Draft(is_first=True)
            assert await link.propose(ask(PROMPT, 2)) == Draft((7, 8))
        assert drafters.num_attempts == 1

    async def test_no_drafts_is_the_source_of_plain_decoding(self) -> None:
        assert await NoDrafts().propose(ask(PROMPT, 4)) == Draft()


class TestADraftTree:
    async def test_is_passed_on_and_one_path_is_a_chain(self) -> None:
        tree = drafting(7, 8, 7, parents=(-1, -1, 1))
        drafters = FakeDrafters([tree, drafting(7, 8, parents=(-1, 0))])
        async with drafters.link() as link:
            draft = await link.propose(ask(PROMPT, 2, draft_nodes=3))
            assert draft == Draft((7, 8, 7), parent_indices=(-1, -1, 1), is_first=True)
            assert await link.propose(ask(PROMPT, 2, draft_nodes=3)) == Draft((7, 8))
        assert drafters.num_attempts == 1

    @pytest.mark.parametrize(
        ("draft", "fragment"),
        [
            (drafting(7, 8, 9, 9, parents=(-1, -1, 1, 0)), "more than 3 tokens"),
            (drafting(7, 8, 9, parents=(-1, -1, -1)), ""),
            (drafting(7, 7, parents=(-1, -1)), "same token"),
            (drafting(7, 8, parents=(-1, 1)), "earlier token"),
            (drafting(7, 8, parents=(-1,)), "parent_indices"),
            (drafting(7, 8, 9, 1, parents=(-1, 0, 1, -1)), "more than"),
            (drafting(7, 8, 9, parents=(-1, 0, 1)), "more than 2 tokens"),
            (drafting(7, VOCAB_SIZE, parents=(-1, -1)), "target does not have"),
        ],
    )
    async def test_is_checked_as_the_verifier_would(
        self, draft: Callable[[], Awaitable[Draft]], fragment: str
    ) -> None:
        drafters = FakeDrafters([draft])
        async with drafters.link() as link:
            checked = await link.propose(ask(PROMPT, 2, draft_nodes=3))
            assert fragment in checked.fallback_reason
            assert bool(checked.token_ids) == (not fragment)
        drafters.assert_all_closed_once()

    async def test_that_nobody_asked_for_is_refused(self) -> None:
        drafters = FakeDrafters([drafting(7, 8, parents=(-1, -1))])
        async with drafters.link() as link:
            assert "sent more than 0 tokens" in (await link.propose(ask(PROMPT, 2))).fallback_reason


class TestASlowOpening:
    async def test_only_the_first_round_waits_and_it_joins_later(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()
        async with drafters.link(timeout_s=0.2) as link:
            waited_ns = []
            for committed in ([*PROMPT, 4], [*PROMPT, 4, 5], [*PROMPT, 4, 5]):
                draft = await link.propose(ask(committed, 2))
                assert draft.token_ids == ()
                assert draft.fallback_reason == "the drafter is still opening"
                assert draft.fallback_code == "opening"
                assert draft.server_ns == draft.elapsed_ns, "waiting is not transport"
                waited_ns.append(draft.elapsed_ns)
            assert waited_ns[0] >= 0.2e9
            assert sum(waited_ns[1:]) < 0.2e9
            drafters.may_open.set()
            await settled()
            assert await link.propose(ask([*PROMPT, 4, 5, 6], 2)) == FIRST
            (session,) = drafters.sessions
            assert session.opened_with == PROMPT
            assert session.rounds == [([4, 5, 6], 6, 2, "")]
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_a_session_that_opens_just_as_the_round_gives_up_is_used(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()
        loop = asyncio.get_running_loop()
        async with drafters.link(timeout_s=0.1) as link:
            # A busy loop finds both due at once: first the opening, then the timeout.
            loop.call_later(0.05, drafters.may_open.set)
            loop.call_later(0.04, time.sleep, 0.1)
            await link.propose(ask(PROMPT, 2))
            await settled()
            assert await link.propose(ask(PROMPT, 2)) == FIRST
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_an_opening_that_hangs_is_given_up_and_tried_again(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()
        async with drafters.link(timeout_s=0.01, open_timeout_s=0.05, retry_s=0.0) as link:
            async with asyncio.timeout(5):
                while drafters.num_attempts < 2:
                    assert (await link.propose(ask(PROMPT, 2))).token_ids == ()
                    await asyncio.sleep(0.005)
            drafters.may_open.set()
            await settled()
            assert await link.propose(ask(PROMPT, 2)) == FIRST
        drafters.assert_all_closed_once()

    async def test_an_opening_that_fails_late_counts_as_lost(self) -> None:
        drafters = FakeDrafters(UnavailableError("gone"))
        drafters.may_open.clear()
        async with drafters.link(timeout_s=0.02) as link:
            await link.propose(ask(PROMPT, 2))
            drafters.may_open.set()
            await settled()
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "gone"
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "gone"
        assert drafters.num_attempts == 1

    async def test_after_a_loss_the_reason_stays_until_one_drafts_again(self) -> None:
        async def lost() -> Draft:
            raise UnavailableError("gone")

        drafters = FakeDrafters([lost], [drafting(7), hang])
        async with drafters.link(timeout_s=0.02, retry_s=0.0) as link:
            drafters.may_open.set()
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "gone"
            drafters.may_open.clear()
            for _ in range(3):
                draft = await link.propose(ask(PROMPT, 2))
                assert (draft.fallback_reason, draft.fallback_code) == ("gone", "unavailable")
            drafters.may_open.set()
            await settled()
            assert (await link.propose(ask(PROMPT, 2))).token_ids == (7,)
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "no draft within 0.02 s"
        assert drafters.num_attempts == 2
        drafters.assert_all_closed_once()


class TestALongFirstDraft:
    """A session's first draft reads all the text and state so far."""

    async def test_the_first_round_waits_and_it_joins_later(self) -> None:
        done = asyncio.Event()

        async def slow() -> Draft:
            await done.wait()
            return Draft((1, 1))

        drafters = FakeDrafters([slow])
        async with drafters.link(timeout_s=0.2) as link:
            waited_ns = []
            for committed in ([*PROMPT, 4], [*PROMPT, 4, 5], [*PROMPT, 4, 5]):
                draft = await link.propose(ask(committed, 2))
                assert (draft.token_ids, draft.fallback_code) == ((), "opening")
                waited_ns.append(draft.elapsed_ns)
            assert waited_ns[0] >= 0.2e9
            assert sum(waited_ns[1:]) < 0.2e9
            done.set()
            await settled()
            # What it drafted at last was for the first round; the time of this one is the usual.
            assert await link.propose(ask([*PROMPT, 4, 5, 6], 2)) == Draft((7, 8))
            (session,) = drafters.sessions
            assert session.rounds == [([4], 4, 2, ""), ([5, 6], 6, 2, "")]
        drafters.assert_all_closed_once()

    async def test_that_hangs_is_given_up_and_another_session_tried(self) -> None:
        drafters = FakeDrafters([hang])
        async with drafters.link(timeout_s=0.01, open_timeout_s=0.05, retry_s=0.0) as link:
            async with asyncio.timeout(5):
                while drafters.num_attempts < 2:
                    assert (await link.propose(ask(PROMPT, 2))).token_ids == ()
                    await asyncio.sleep(0.005)
            await settled()
            assert await link.propose(ask(PROMPT, 2)) == FIRST
        drafters.assert_all_closed_once()

    async def test_that_fails_late_counts_as_lost(self) -> None:
        done = asyncio.Event()

        async def late() -> Draft:
            await done.wait()
            raise UnavailableError("gone")

        drafters = FakeDrafters([late])
        async with drafters.link(timeout_s=0.02) as link:
            await link.propose(ask(PROMPT, 2))
            done.set()
            await settled()
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "gone"
            drafters.assert_all_closed_once()
            assert (await link.propose(ask(PROMPT, 2))).fallback_reason == "gone"
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_that_is_left_is_cancelled(self) -> None:
        cancelled = asyncio.Event()

        async def forever() -> Draft:
            try:
                return await hang()
            finally:
                cancelled.set()

        drafters = FakeDrafters([forever])
        async with soon(), drafters.link(timeout_s=0.02) as link:
            await link.propose(ask(PROMPT, 2))
            assert not cancelled.is_set()
        assert cancelled.is_set()
        drafters.assert_all_closed_once()


class TestALostDrafter:
    async def test_the_loss_is_named_until_there_is_another(self) -> None:
        drafters = FakeDrafters([answer, failing(UnavailableError("the drafter was lost"))])
        async with drafters.link() as link:
            assert (await link.propose(ask(PROMPT, 2))).token_ids == (7, 8)
            for _ in range(3):
                draft = await link.propose(ask(PROMPT, 2))
                assert (draft.token_ids, draft.fallback_reason) == ((), "the drafter was lost")
            drafters.assert_all_closed_once()
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_the_log_names_the_drafter(self, caplog: pytest.LogCaptureFixture) -> None:
        async with FakeDrafters(UnavailableError("gone")).link() as link:
            await link.propose(ask(PROMPT, 2))
        (record,) = [record for record in caplog.records if record.message == "drafting without a drafter"]
        assert (vars(record)["drafter"], vars(record)["code"]) == ("ngram", "unavailable")

    async def test_a_late_draft_counts_as_lost(self) -> None:
        drafters = FakeDrafters([answer, hang])
        async with drafters.link(timeout_s=0.02) as link:
            await link.propose(ask(PROMPT, 2))
            draft = await link.propose(ask(PROMPT, 2))
            assert draft.fallback_reason == "no draft within 0.02 s"
            assert draft.fallback_code == "deadline_exceeded"
            drafters.assert_all_closed_once()
            assert (await link.propose(ask(PROMPT, 2))).token_ids == ()
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    @pytest.mark.parametrize(
        "error", [UnavailableError("x"), ResourceExhaustedError("x"), InternalError("x")], ids=repr
    )
    async def test_another_session_gets_all_that_is_committed_by_then(self, error: SpecdecError) -> None:
        drafters = FakeDrafters([answer, failing(error)])
        async with drafters.link(retry_s=0.0) as link:
            await link.propose(ask([*PROMPT, 4], 2))
            assert (await link.propose(ask([*PROMPT, 4, 5], 2))).token_ids == ()
            assert (await link.propose(ask([*PROMPT, 4, 5, 6], 2))).token_ids == ()
            await settled()
            assert (await link.propose(ask([*PROMPT, 4, 5, 6, 7, 8, 9], 2))).token_ids == (7, 8)
            _, second = drafters.sessions
            assert second.opened_with == [*PROMPT, 4, 5, 6]
            assert second.rounds == [([7, 8, 9], 9, 2, "")]
        drafters.assert_all_closed_once()

    async def test_the_pause_grows_while_it_fails_and_is_short_again_after_a_draft(self) -> None:
        pause_s = 0.05
        lost = UnavailableError("x")
        drafters = FakeDrafters(lost, lost, lost, [answer, failing(lost)])
        async with drafters.link(retry_s=pause_s) as link, asyncio.timeout(10):
            while drafters.num_attempts < 5:
                await link.propose(ask(PROMPT, 2))
                await asyncio.sleep(0.001)
        pauses = [later - earlier for earlier, later in pairwise(drafters.attempted_at)]
        assert len(pauses) == 4
        assert pauses[0] >= pause_s
        assert pauses[1] >= 2 * pause_s
        assert pauses[2] >= 4 * pause_s
        assert pauses[3] < 8 * pause_s
        drafters.assert_all_closed_once()

    @pytest.mark.parametrize(
        "error",
        [
            FailedPreconditionError("another vocabulary"),
            InvalidArgumentError("too long"),
            NotFoundError("no such drafter"),
            UnimplementedError("no trees"),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("is_open", [False, True])
    async def test_what_would_fail_again_is_not_tried_again(self, error: SpecdecError, is_open: bool) -> None:
        drafters = FakeDrafters([failing(error)] if is_open else error)
        async with drafters.link(retry_s=0.0) as link:
            for _ in range(5):
                draft = await link.propose(ask(PROMPT, 2))
                assert (draft.token_ids, draft.fallback_reason) == ((), error.message)
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    @pytest.mark.parametrize("opens", [False, True])
    async def test_a_defect_counts_as_lost(self, opens: bool) -> None:
        async def defective() -> Draft:
            raise KeyError("x")

        drafters = FakeDrafters([answer, defective] if opens else RuntimeError("x"))
        async with drafters.link() as link:
            if opens:
                assert await link.propose(ask(PROMPT, 2)) == FIRST
            for _ in range(2):
                draft = await link.propose(ask(PROMPT, 2))
                assert (draft.token_ids, draft.fallback_code) == ((), "internal")
                assert draft.fallback_reason == ("KeyError: 'x'" if opens else "RuntimeError: x")
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()


class ReadingDrafters(FakeDrafters):
    """Their sessions read the target's state."""

    session_class = ReadingSession


class TestALostVerifier:
    """The next verifier's session has another state; a drafter's session cannot go over to it."""

    OLD, NEW = State("old"), State("new")

    async def test_a_session_that_reads_its_state_is_left_for_another_which_the_round_waits_for(self) -> None:
        drafters = ReadingDrafters()
        loop = asyncio.get_running_loop()
        async with drafters.link(retry_s=NEVER_S) as link:
            assert await link.propose(ask(PROMPT, 2, state=self.OLD)) == FIRST
            assert await link.propose(ask([*PROMPT, 4], 2, state=self.OLD)) == Draft((7, 8))
            drafters.may_open.clear()
            loop.call_later(0.05, drafters.may_open.set)
            assert await link.propose(ask([*PROMPT, 4, 5], 2, state=self.NEW)) == FIRST
            first, second = drafters.sessions
            assert (first.num_closed, second.num_closed) == (1, 0)
            assert second.opened_with == [*PROMPT, 4, 5]
            assert second.rounds == [([], 5, 2, "")]
            assert await link.propose(ask([*PROMPT, 4, 5, 6], 2, state=self.NEW)) == Draft((7, 8))
        drafters.assert_all_closed_once()

    async def test_only_one_round_waits_for_the_other_session(self) -> None:
        drafters = ReadingDrafters()
        async with drafters.link(timeout_s=0.2) as link:
            assert await link.propose(ask(PROMPT, 2, state=self.OLD)) == FIRST
            drafters.may_open.clear()
            drafts = [await link.propose(ask(PROMPT, 2, state=self.NEW)) for _ in range(3)]
            assert {draft.fallback_code for draft in drafts} == {"opening"}
            assert drafts[0].elapsed_ns >= 0.2e9
            assert sum(draft.elapsed_ns for draft in drafts[1:]) < 0.2e9
        assert drafters.num_cancelled == 1
        drafters.assert_all_closed_once()

    async def test_a_first_draft_that_reads_its_state_is_given_up(self) -> None:
        cancelled = asyncio.Event()

        async def forever() -> Draft:
            try:
                return await hang()
            finally:
                cancelled.set()

        drafters = ReadingDrafters([forever])
        async with drafters.link(timeout_s=0.2) as link:
            assert (await link.propose(ask(PROMPT, 2, state=self.OLD))).fallback_code == "opening"
            assert await link.propose(ask([*PROMPT, 4], 2, state=self.NEW)) == FIRST
            assert cancelled.is_set()
            assert drafters.sessions[1].opened_with == [*PROMPT, 4]
        drafters.assert_all_closed_once()

    async def test_a_session_that_is_still_opening_is_kept(self) -> None:
        drafters = ReadingDrafters()
        drafters.may_open.clear()
        async with drafters.link(timeout_s=0.02) as link:
            for state in (self.OLD, self.NEW):
                assert (await link.propose(ask(PROMPT, 2, state=state))).fallback_code == "opening"
            drafters.may_open.set()
            await settled()
            assert await link.propose(ask(PROMPT, 2, state=self.NEW)) == FIRST
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_a_session_that_reads_no_state_is_kept(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link() as link:
            assert await link.propose(ask(PROMPT, 2, state=self.OLD)) == FIRST
            assert await link.propose(ask(PROMPT, 2, state=self.NEW)) == Draft((7, 8))
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()

    async def test_what_failed_for_good_is_tried_again(self) -> None:
        drafters = ReadingDrafters([failing(FailedPreconditionError("no state"))])
        async with drafters.link(retry_s=NEVER_S) as link:
            for _ in range(2):
                lost = await link.propose(ask(PROMPT, 2, state=self.OLD))
                assert lost.fallback_reason == "no state"
            # Nobody waits for it, and why the one before was lost does not matter any more.
            drafters.may_open.clear()
            opening = await link.propose(ask([*PROMPT, 4], 2, state=self.NEW))
            assert opening.fallback_reason == "the drafter is still opening"
            drafters.may_open.set()
            await settled()
            assert await link.propose(ask([*PROMPT, 4], 2, state=self.NEW)) == FIRST
            assert drafters.sessions[1].opened_with == [*PROMPT, 4]
        assert drafters.num_attempts == 2
        drafters.assert_all_closed_once()


class TestAWrongDrafter:
    @pytest.mark.parametrize(
        ("token_ids", "reason"),
        [((1, 2, 3), "more than 2 tokens"), ((5, VOCAB_SIZE), "does not have")],
    )
    async def test_a_draft_the_verifier_would_refuse_is_dropped(
        self, token_ids: tuple[int, ...], reason: str
    ) -> None:
        drafters = FakeDrafters([drafting(*token_ids)])
        async with drafters.link(retry_s=0.0) as link:
            draft = await link.propose(ask(PROMPT, 2))
            assert draft.token_ids == ()
            assert reason in draft.fallback_reason
            drafters.assert_all_closed_once()
            assert (await link.propose(ask(PROMPT, 2))).token_ids == ()
        assert drafters.num_attempts == 1

    async def test_the_most_and_the_last_token_are_fine(self) -> None:
        drafters = FakeDrafters([drafting(VOCAB_SIZE - 1, 0)])
        async with drafters.link() as link:
            assert (await link.propose(ask(PROMPT, 2))).token_ids == (VOCAB_SIZE - 1, 0)


class TestADrafterWithoutRoom:
    """It says when there should be room, and is asked then, however soon others would be tried again."""

    @staticmethod
    def full(retry_after_s: float | None) -> ResourceExhaustedError:
        return ResourceExhaustedError("every slot is taken", retry_after_s=retry_after_s)

    @staticmethod
    async def assert_tried_after(error: SpecdecError, expected_s: float) -> None:
        """Check when a drafter that refused a session so is tried again."""
        drafters = FakeDrafters(error)
        async with drafters.link(retry_s=1.0) as link:
            before = time.monotonic()
            await link.propose(ask(PROMPT, 2))
            state = link._state
            assert isinstance(state, Lost)
            assert before + expected_s <= state.retry_at <= time.monotonic() + expected_s

    @pytest.mark.parametrize(("told_s", "expected_s"), [(None, 1.0), (0.2, 1.0), (12.0, 12.0), (1e9, 30.0)])
    async def test_is_tried_again_when_it_said_but_within_bounds(
        self, told_s: float | None, expected_s: float
    ) -> None:
        await self.assert_tried_after(self.full(told_s), expected_s)

    async def test_what_other_errors_say_is_not_waited_for(self) -> None:
        await self.assert_tried_after(UnavailableError("it is loading", retry_after_s=12.0), 1.0)


class TestADrafterThatIsNeverRight:
    """It drafts 7 and 8; what the target picks, its record learns from the rounds that follow."""

    @staticmethod
    async def rounds(link: DraftLink, picks: Sequence[int], committed: list[int]) -> list[Draft]:
        """Run rounds whose first pick of the target is given; return their drafts."""
        drafts = []
        for pick in picks:
            drafts.append(await link.propose(ask(committed, 2)))
            committed.append(pick)
        return drafts

    async def test_is_left_alone_by_every_session_and_asked_again_after_the_pause(self) -> None:
        now = [0.0]
        record = TrackRecord("ngram", pause_s=30, now_s=lambda: now[0])
        drafters, committed = FakeDrafters(), list(PROMPT)
        drafters.records = [record]
        async with drafters.link() as link, drafters.link() as other:
            await self.rounds(other, [9], list(PROMPT))
            drafts = await self.rounds(link, [9] * 60, committed)
            num_asked = sum(bool(draft.token_ids) for draft in drafts)
            assert 20 <= num_asked <= 50
            assert {draft.fallback_code for draft in drafts[num_asked:]} == {NEVER_RIGHT}
            assert {draft.fallback_reason for draft in drafts[num_asked:]} == {record.verdict}
            assert [draft.fallback_code for draft in await self.rounds(other, [9], list(PROMPT))] == [
                NEVER_RIGHT
            ]
            drafters.assert_all_closed_once()
            async with drafters.link() as third:
                assert (await third.propose(ask(PROMPT, 2))).fallback_code == NEVER_RIGHT
            assert drafters.num_attempts == 2, "a session that begins in the pause is not opened"
            now[0] += 30
            assert (await link.propose(ask(committed, 2))).token_ids == ()
            await settled()
            assert (await link.propose(ask(committed, 2))).token_ids == (7, 8)
            assert drafters.sessions[-1].opened_with == committed, "it reads what it missed"
            committed.append(7)
            assert (await link.propose(ask(committed, 2))).token_ids == (7, 8)
            assert record.verdict == ""
        assert drafters.num_attempts == 3
        drafters.assert_all_closed_once()

    async def test_is_asked_all_the_same_where_a_request_fixed_the_size(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link(may_pause=False) as link:
            drafts = await self.rounds(link, [9] * 60, list(PROMPT))
        assert all(draft.token_ids for draft in drafts)
        assert drafters.records[0].is_paused, "others need not try"

    async def test_one_replica_is_left_and_another_goes_on(self) -> None:
        drafters, committed = FakeDrafters(), list(PROMPT)
        wrong, right = drafters.records = [TrackRecord("ngram", "a"), TrackRecord("ngram", "b")]
        async with drafters.link() as link:
            drafts: list[Draft] = []
            while not wrong.is_paused:
                drafts += await self.rounds(link, [9], committed)
            (left,) = await self.rounds(link, [9], committed)
            assert (left.fallback_code, left.fallback_reason) == (NEVER_RIGHT, wrong.verdict)
            await settled()
            drafts = await self.rounds(link, [7] * 40, committed)
            assert all(draft.token_ids == (7, 8) for draft in drafts)
            assert drafters.sessions[-1].record is right
            assert right.verdict == ""
        assert drafters.num_attempts == 2
        async with drafters.link() as another:
            assert (await another.propose(ask(PROMPT, 2))).token_ids == (7, 8)
        drafters.assert_all_closed_once()

    async def test_it_is_not_asked_while_all_its_replicas_are_wrong(self) -> None:
        drafters, committed = FakeDrafters(), list(PROMPT)
        drafters.records = [TrackRecord("ngram", "a"), TrackRecord("ngram", "b")]
        async with drafters.link() as link:
            while not all(record.is_paused for record in drafters.records):
                await self.rounds(link, [9], committed)
                await settled()
            drafts = await self.rounds(link, [9] * 20, committed)
            assert {draft.fallback_code for draft in drafts} == {NEVER_RIGHT}
        assert drafters.num_attempts == 2
        drafters.assert_all_closed_once()

    async def test_one_branch_of_a_tree_that_is_right_is_enough(self) -> None:
        tree = drafting(7, 8, 9, parents=(-1, 0, -1))
        drafters = FakeDrafters([tree] * 60)
        async with drafters.link() as link:
            committed = list(PROMPT)
            for _ in range(60):
                assert (await link.propose(ask(committed, 2, draft_nodes=3))).token_ids == (7, 8, 9)
                committed.append(9)
        assert drafters.records[0].verdict == ""

    async def test_having_no_guess_is_not_being_wrong(self) -> None:
        drafters = FakeDrafters([drafting()] * 100)
        async with drafters.link() as link:
            await self.rounds(link, [9] * 100, list(PROMPT))
        assert drafters.records[0].verdict == ""


class TestALinkThatLetsGo:
    """The request waits in the middle of its answer, and has no verifier."""

    async def test_ends_its_session_and_opens_another_which_the_round_waits_for(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link() as link:
            await link.propose(ask([*PROMPT, 4], 2))
            await link.let_go()
            assert [session.num_closed for session in drafters.sessions] == [1]
            assert not link.is_open
            await settled()
            assert drafters.num_attempts == 1
            await link.open_again([*PROMPT, 4])
            assert link.is_open
            assert await link.propose(ask([*PROMPT, 4, 5], 2)) == FIRST
            assert drafters.sessions[1].opened_with == [*PROMPT, 4]
            assert [new for new, *_ in drafters.sessions[1].rounds] == [[5]]
        drafters.assert_all_closed_once()

    async def test_stops_what_opens_or_drafts_and_may_let_go_twice(self) -> None:
        drafters = FakeDrafters([hang])
        async with soon(), drafters.link(timeout_s=0.2) as link:
            assert (await link.propose(ask([*PROMPT, 4], 2))).fallback_code == "opening"
            await link.let_go()
            await link.let_go()
            drafters.assert_all_closed_once()
            drafters.may_open.clear()
            await link.open_again([*PROMPT, 4])
            await settled()
            await link.let_go()
            assert (drafters.num_attempts, drafters.num_cancelled) == (2, 1)
            drafters.may_open.set()
            await link.open_again([*PROMPT, 4])
            assert await link.propose(ask([*PROMPT, 4], 2)) == FIRST
        drafters.assert_all_closed_once()

    async def test_opens_nothing_that_was_not_open(self) -> None:
        drafters = FakeDrafters(NotFoundError("no such drafter"))
        async with (
            drafters.link(opens_at_once=False) as joins_later,
            drafters.link() as refused,
        ):
            assert (await refused.propose(ask([*PROMPT, 4], 2))).fallback_code == "not_found"
            for link in (joins_later, refused):
                await link.let_go()
                await link.open_again([*PROMPT, 4])
            await settled()
            assert drafters.num_attempts == 1
            again = await refused.propose(ask([*PROMPT, 4], 2))
            assert again.fallback_reason == "no such drafter", "it is told until there is another"

    async def test_opens_nothing_that_is_never_right(self) -> None:
        drafters = FakeDrafters()
        async with drafters.link() as link:
            await link.propose(ask([*PROMPT, 4], 2))
            await link.let_go()
            for _ in range(40):
                drafters.records[0].judge(is_right=False)
            await link.open_again([*PROMPT, 4])
            await settled()
        assert drafters.num_attempts == 1
        drafters.assert_all_closed_once()


class TestLeaving:
    async def test_while_opening(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()
        async with soon(), drafters.link():
            await until(lambda: drafters.num_attempts == 1)
        assert drafters.num_cancelled == 1

    async def test_while_opening_when_it_succeeds_nevertheless(self) -> None:
        drafters = FakeDrafters()
        opening = asyncio.Event()

        async def stubborn(committed_token_ids: Sequence[int]) -> FakeSession:
            try:
                opening.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return await drafters.connect(committed_token_ids)
            raise AssertionError("unreachable")

        async with DraftLink(stubborn, PROMPT, vocab_size=VOCAB_SIZE, timeout_s=30):
            await opening.wait()
        assert len(drafters.sessions) == 1
        drafters.assert_all_closed_once()

    async def test_before_an_opening_that_failed_was_looked_at(self) -> None:
        drafters = FakeDrafters(UnavailableError("gone"))
        async with drafters.link():
            await until(lambda: not drafters.attempts)
        assert drafters.num_attempts == 1

    async def test_after_a_loss(self) -> None:
        drafters = FakeDrafters([failing(UnavailableError("gone"))])
        async with drafters.link() as link:
            await link.propose(ask(PROMPT, 2))
        drafters.assert_all_closed_once()

    async def test_when_the_request_is_cancelled_during_a_draft(self) -> None:
        drafters = FakeDrafters([hang])

        async def request() -> None:
            async with drafters.link() as link:
                await link.propose(ask(PROMPT, 2))

        task = asyncio.create_task(request())
        await until(lambda: bool(drafters.sessions and drafters.sessions[0].rounds))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with soon():
                await task
        drafters.assert_all_closed_once()

    async def test_when_the_request_is_cancelled_while_opening(self) -> None:
        drafters = FakeDrafters()
        drafters.may_open.clear()

        async def request() -> None:
            async with drafters.link() as link:
                await link.propose(ask(PROMPT, 2))

        task = asyncio.create_task(request())
        await until(lambda: drafters.num_attempts == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with soon():
                await task
        assert drafters.num_cancelled == 1
        assert not drafters.sessions


@pytest.mark.parametrize(
    ("num_known", "blocks"),
    [(0, [5, 6, 9, 2]), (2, [9, 2]), (3, [2]), (4, [])],
    ids=["late", "2", "3", "all"],
)
def test_a_drafter_is_told_how_much_it_may_read_by_now_and_which_blocks_are_new(
    num_known: int, blocks: list[int]
) -> None:
    opened = target_state_pb2.TargetStateRef(
        session_id="s", verifier_uri="v", generation=3, cached_length=7, block_ids=[5, 6]
    )
    grown = verifier_pb2.VerifyResult(cached_length=140)
    grown.target_state.block_ids.extend([9, 2])
    state = RemoteState(opened, 7).after(grown).after(verifier_pb2.VerifyResult(cached_length=150))
    message = state.message(num_known_blocks=num_known)
    assert message is not None
    assert (message.session_id, message.verifier_uri, message.generation) == ("s", "v", 3)
    assert (message.cached_length, state.num_blocks) == (150, 4)
    assert list(message.block_ids) == blocks
    assert message.num_known_blocks == (num_known if blocks else 0)
    assert (opened.cached_length, list(opened.block_ids)) == (7, [5, 6])


@pytest.mark.parametrize("num_known", [0, 2])
def test_a_drafter_is_told_where_the_last_positions_are_by_now(num_known: int) -> None:
    opened = target_state_pb2.TargetStateRef(session_id="s", cached_length=7, block_ids=[5, 6])
    opened.window.block_ids.extend([1, 2])
    state = RemoteState(opened, 7)
    message = state.message(num_known_blocks=num_known)
    assert message is not None
    assert list(message.window.block_ids) == [1, 2]
    later = verifier_pb2.VerifyResult(cached_length=140)
    later.target_state.window.block_ids.extend([2, 4])
    later.target_state.window.num_gone_blocks = 1
    state = state.after(later)
    # An answer without a handle changes nothing.
    message = state.after(verifier_pb2.VerifyResult(cached_length=141)).message(num_known_blocks=num_known)
    assert message is not None
    assert (list(message.window.block_ids), message.window.num_gone_blocks) == ([2, 4], 1)
    assert list(opened.window.block_ids) == [1, 2]
    # Where all layers have the same blocks, nothing is said of others.
    plain = target_state_pb2.TargetStateRef(session_id="s", block_ids=[5, 6])
    message = RemoteState(plain, 7).message(num_known_blocks=num_known)
    assert message is not None
    assert not message.HasField("window")
