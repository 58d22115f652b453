"""A verifier session that outlives its verifier, or its room there: it is reopened from its committed ids."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Protocol, Self

from gateway.replicas.replica import Lease, Replica
from gateway.rounds.vocabulary import Draft, Round, Verified, VerifierSession
from specdec.contract.errors import (
    SESSION_PREEMPTED,
    AbortedError,
    InternalError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
)
from specdec.v1 import verifier_pb2

logger = logging.getLogger(__name__)

VerifierReplica = Replica[verifier_pb2.VerifierServiceGetInfoResponse]
VerifierLease = Lease[verifier_pb2.VerifierServiceGetInfoResponse]

_RETRY_S = 0.2
_FULL_REASONS = frozenset({"NO_SESSION_SLOT", "KV_POOL_FULL"})
"""Why a verifier refuses a session that it has room for at another time."""
_TOO_SMALL = "EXCEEDS_KV_POOL"
"""Why a verifier refuses a session that it never has room for."""


def is_full(error: Exception) -> bool:
    """Return whether a verifier refuses a session because of those that it has."""
    return isinstance(error, ResourceExhaustedError) and error.reason in _FULL_REASONS


def _is_preempted(error: Exception) -> bool:
    """Return whether a verifier ended a session because older ones needed its KV."""
    return isinstance(error, AbortedError) and error.reason == SESSION_PREEMPTED


def _concerns_one(error: SpecdecError) -> bool:
    """Return whether a replica refuses a session that another may take."""
    return isinstance(error, InternalError | ResourceExhaustedError) or error.reason == _TOO_SMALL


class OpenableSession(VerifierSession, Protocol):
    """A session on one replica; leaving its block closes it."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


Connect = Callable[[VerifierReplica, Sequence[int]], OpenableSession]
"""A session on a replica that begins with these committed tokens."""


class Pick(Protocol):
    """Finds a replica that can go on with the generation and is not too busy."""

    def __call__(self, *, without: Collection[VerifierReplica] = ()) -> VerifierReplica:
        """Return a replica other than those; UnavailableError: none is ready."""


class Owner(Protocol):
    """The request whose session it is: it learns what becomes of it."""

    def runs_on(self, replica: VerifierReplica) -> None:
        """Take note that a replica has the session from now on."""

    def lost_verifier(self, reason: str) -> None:
        """Take note that a session was lost."""

    def was_preempted(self) -> None:
        """Take note that a session was preempted."""

    async def turn_again(self, refusal: SpecdecError, committed_token_ids: Sequence[int]) -> None:
        """Return when the request may look for room again; `refusal` is what a verifier said. It goes on
        after the committed tokens."""


class LastingVerifierSession:
    """One generation's verifier sessions, one after the other as replicas are lost or need their room for
    older sessions. Use as `async with`.

    What a replica commits is a function of prompt, parameters, seed and position: the next session goes on as
    the last one would have. The round in which it ended commits the one token that opening emits.

    Args:
        first: lease of the replica the generation starts on; it ends when the session is lost or left.
        connect: makes the session on a replica.
        pick: finds the next replica.
        prompt_token_ids: what the generation starts with, without any output.
        wait_s: how long a lost session waits for a replica that takes it.
        owner: told of every session that was lost or preempted.
    """

    def __init__(
        self,
        first: VerifierLease,
        connect: Connect,
        pick: Pick,
        *,
        prompt_token_ids: Sequence[int],
        wait_s: float,
        owner: Owner,
    ) -> None:
        self._connect, self._pick = connect, pick
        self._committed = list(prompt_token_ids)
        self._wait_s = wait_s
        self._owner = owner
        self._lease = first
        self._session: OpenableSession | None = None
        self._was_open = False
        """Whether a replica took the generation, which has begun."""
        self._stack = AsyncExitStack()
        """Ends the lease and closes the session."""
        self._stack.callback(first.end)

    async def __aenter__(self) -> LastingVerifierSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def open(self, traceparent: str) -> Verified:
        """Prefill the prompt; the first token is the bonus token.

        Raises:
            SpecdecError: the verifier refused, or it was lost and no other is ready.
        """
        try:
            verified = await self._open(traceparent)
        except SpecdecError as error:
            verified = await self._anew(error, traceparent)
        return self._noted((), verified)

    async def verify(
        self,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        traceparent: str,
        parent_indices: Sequence[int] = (),
    ) -> Verified:
        """Check a draft in one pass; where the session is opened anew, nothing of the draft is accepted.

        Raises:
            SpecdecError: the verifier refused, or it was lost and no other is ready.
        """
        assert self._session is not None
        try:
            with self._blaming():
                verified = await self._session.verify(
                    base_committed_length, draft_token_ids, traceparent, parent_indices
                )
        except SpecdecError as error:
            verified = replace(await self._anew(error, traceparent), is_reopened=True)
        return self._noted(draft_token_ids, verified)

    async def _anew(self, error: SpecdecError, traceparent: str) -> Verified:
        """Open a session that goes on where one ended.

        Raises:
            SpecdecError: no other session would do better, or no replica takes it.
        """
        while True:
            try:
                if _is_preempted(error):
                    return await self._in_turn(error, traceparent)
                if isinstance(error, UnavailableError):
                    return await self._reopen(error, traceparent)
                if _concerns_one(error):
                    return await self._elsewhere(error, traceparent)
            except AbortedError as other:
                error = other
            else:
                raise error

    def _noted(self, draft_token_ids: Sequence[int], verified: Verified) -> Verified:
        self._committed += Round(Draft(tuple(draft_token_ids)), verified).token_ids
        self._lease.replica.succeeded()
        self._was_open = True
        return verified

    async def _open(self, traceparent: str) -> Verified:
        connected = self._connect(self._lease.replica, self._committed)
        self._session = await self._stack.enter_async_context(connected)
        with self._blaming():
            verified = await self._session.open(traceparent)
        self._lease.opened()
        self._owner.runs_on(self._lease.replica)
        return verified

    async def _open_on(self, replica: VerifierReplica, traceparent: str) -> Verified:
        """Open on another replica; the session before it is closed."""
        self._lease = replica.lease()
        self._stack.callback(self._lease.end)
        return await self._open(traceparent)

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Take note of a defect of the session's replica within the block."""
        try:
            yield
        except InternalError:
            self._lease.replica.failed()
            raise

    async def _elsewhere(self, error: SpecdecError, traceparent: str) -> Verified:
        """Open on another replica where one is broken, full or too small; each is tried once. For a session
        that has begun, those that are full are asked again and again, for as long as for a lost one.

        Raises:
            SpecdecError: no other replica takes the session. Before it was ever open this is the error of a
                replica that is full, if there is such a replica: it takes the session later. Otherwise it is
                the first error.
        """
        give_up_at = time.monotonic() + self._wait_s
        tried: list[VerifierReplica] = []
        full: list[VerifierReplica] = []
        errors = [error]
        while True:
            (full if is_full(errors[-1]) else tried).append(self._lease.replica)
            await self._stack.aclose()
            replica = await self._another(tried, full, give_up_at)
            if replica is None:
                raise self._decisive(errors)
            if len(errors) == 1 and isinstance(error, InternalError):
                logger.warning("verifier failed", extra={"reason": error.message})
                self._owner.lost_verifier(error.message)
            try:
                return await self._open_on(replica, traceparent)
            except SpecdecError as other:
                if not (isinstance(other, UnavailableError) or _concerns_one(other)):
                    raise
                errors.append(other)

    async def _another(
        self, tried: Collection[VerifierReplica], full: list[VerifierReplica], give_up_at: float
    ) -> VerifierReplica | None:
        """Return a replica that was not asked yet, or is worth asking again; None: there is none, or not in
        time.

        Args:
            full: those that were full; once some time has passed, none is taken for full.
        """
        with suppress(UnavailableError):
            return self._pick(without=[*tried, *full])
        if not (self._was_open and full and time.monotonic() + _RETRY_S < give_up_at):
            return None
        await asyncio.sleep(_RETRY_S)
        full.clear()
        with suppress(UnavailableError):
            return self._pick(without=tried)
        return None

    def _decisive(self, errors: Sequence[SpecdecError]) -> SpecdecError:
        full = [] if self._was_open else [error for error in errors if is_full(error)]
        return [*full, *errors][0]

    async def _in_turn(self, error: SpecdecError, traceparent: str) -> Verified:
        """Open on another replica at once where one has room; else wait for a turn, and open on any.

        Raises:
            AbortedError: the session was preempted again.
            InvalidArgumentError: all replicas that are left are too small for it.
            SpecdecError: see `_reopen`.
        """
        self._owner.was_preempted()
        self._was_open = True  # it has begun, even where its prompt was still read
        logger.info("verifier preempted the session", extra={"uri": self._lease.replica.uri})
        full, too_small = [self._lease.replica], list[VerifierReplica]()
        while True:
            await self._stack.aclose()
            try:
                replica = self._pick(without=[*full, *too_small])
            except UnavailableError:
                if self._lease.replica in too_small and not full:
                    raise error from None
                await self._owner.turn_again(error, self._committed)
                full = []
                try:
                    replica = self._pick(without=too_small)
                except UnavailableError as gone:
                    return await self._reopen(gone, traceparent)
            try:
                return await self._open_on(replica, traceparent)
            except UnavailableError as lost:
                return await self._reopen(lost, traceparent)
            except InternalError as defect:
                return await self._elsewhere(defect, traceparent)
            except SpecdecError as other:
                if not _concerns_one(other):
                    raise
                error = other
                (full if is_full(other) else too_small).append(replica)

    async def _reopen(self, lost: UnavailableError, traceparent: str) -> Verified:
        """Open on another replica, or on the same when it is back; one that is broken or too small is tried
        once.

        Raises:
            ResourceExhaustedError: a replica is full, and the session was never open: it may as well wait.
            UnavailableError: the error it was lost with, and why no replica took the session in time.
        """
        logger.warning("verifier lost", extra={"reason": lost.message})
        self._owner.lost_verifier(lost.message)
        give_up_at = time.monotonic() + self._wait_s
        broken: list[VerifierReplica] = []
        while True:
            await self._stack.aclose()
            try:
                return await self._open_on(self._next(broken), traceparent)
            except SpecdecError as error:
                if not (isinstance(error, UnavailableError) or _concerns_one(error)):
                    raise
                if is_full(error) and not self._was_open:
                    raise
                if isinstance(error, InternalError) or error.reason == _TOO_SMALL:
                    broken.append(self._lease.replica)
                if time.monotonic() + _RETRY_S >= give_up_at:
                    raise _lost_for_good(lost, error) from error
                await asyncio.sleep(_RETRY_S)

    def _next(self, broken: Collection[VerifierReplica]) -> VerifierReplica:
        """Return another replica than the last, which may stand still and not be known to yet; the last one
        where there is no other.

        Raises:
            UnavailableError: none is ready.
        """
        with suppress(UnavailableError):
            return self._pick(without=[*broken, self._lease.replica])
        return self._pick(without=broken)


def _lost_for_good(lost: UnavailableError, error: SpecdecError) -> UnavailableError:
    message = f"{lost.message} {error.message}" if error.reason == "NO_REPLICA" else lost.message
    return UnavailableError(message, reason=lost.reason, retry_after_s=lost.retry_after_s)
