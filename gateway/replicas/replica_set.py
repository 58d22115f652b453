"""The replicas of one service: which there are, which are healthy, who gets the next session."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, Generic

import grpc

from gateway.replicas.names import Resolve, host_of, is_name, resolve_name
from gateway.replicas.replica import InfoT, Replica, ReplicaWatch
from gateway.replicas.shared_calls import CallKind
from specdec.contract.errors import UnavailableError
from specdec.transport.tls import OutgoingTls

RESOLVE_INTERVAL_S = 5.0
NEAR_SESSIONS = 4
"""How many sessions more a replica may have that is near: a drafter that drafts for so many others is slower
than one that has to be sent the target's state."""
REFRESH_INTERVAL_S = 1.0
"""How long what replicas said of their load is fresh, seconds."""


class ReplicaSet(Generic[InfoT]):
    """All replicas of one service, each watched.

    A `dns:` URI stands for every address its name has, each a replica of its own; the name is resolved again
    and again, so that replicas may come and go. A session stays with its replica; a new one goes to the less
    busy of two ready replicas that are drawn by lot. Gateways that all took the least busy of all would all
    take the same one, until they hear that it is busy.

    Args:
        service: the service's full name.
        uris: addresses and names.
        get_info: see ReplicaWatch.
        check: see ReplicaWatch.
        kind: how sessions on a replica share a call; None: there are no sessions.
        rng: draws the lots; None: a generator with a seed of its own.
    """

    def __init__(
        self,
        service: str,
        uris: Sequence[str],
        *,
        get_info: Callable[[grpc.aio.Channel], Any],
        check: Callable[[InfoT], None],
        resolve: Resolve = resolve_name,
        resolve_interval_s: float = RESOLVE_INTERVAL_S,
        tls: OutgoingTls | None = None,
        kind: CallKind | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.service = service
        self._kind = kind
        self._rng = rng or random.Random()
        self._tls = tls
        self._get_info = get_info
        self._check = check
        self._resolve = resolve
        self._resolve_interval_s = resolve_interval_s
        self._changed = asyncio.Condition()
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf
        """When the replicas were last asked how busy they are, by time.monotonic."""
        self._watches: dict[str, ReplicaWatch[InfoT]] = {}
        """The watches, by the replica's address."""
        self._unresolved: dict[str, str] = {}
        """Reasons why names have no addresses, by name."""
        for uri in uris:
            if not is_name(uri):
                self._add(uri)
        names = [uri for uri in uris if is_name(uri)]
        self._resolving = [asyncio.ensure_future(self._follow_name(uri)) for uri in names]

    @property
    def replicas(self) -> list[Replica[InfoT]]:
        """The replicas, ready or not; may be read by any thread."""
        return [watch.replica for watch in list(self._watches.values())]

    @property
    def num_ready(self) -> int:
        """Replicas that can be picked; may be read by any thread."""
        return sum(replica.is_ready for replica in self.replicas)

    async def close(self) -> None:
        """Stop watching and close the channels."""
        for task in self._resolving:
            task.cancel()
        await asyncio.gather(*self._resolving, return_exceptions=True)
        for uri in list(self._watches):
            await self._remove(uri)

    def _add(self, uri: str, server_name: str = "") -> None:
        self._watches[uri] = ReplicaWatch(
            Replica(uri, self.service, self._tls, server_name, self._kind),
            get_info=self._get_info,
            check=self._check,
            on_change=self._notify,
        )

    async def _remove(self, uri: str) -> None:
        await self._watches.pop(uri).close()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _follow_name(self, uri: str) -> None:
        """Keep the replicas of a name in step with its addresses."""
        mine: set[str] = set()
        while True:
            try:
                found = set(await self._resolve(uri))
                self._unresolved.pop(uri, None)
            except OSError as error:
                found = mine  # a failing name server does not make replicas go away
                self._unresolved[uri] = f"the name cannot be resolved: {error}"
            for address in found - self._watches.keys():
                # The certificate is made out to the name, not to each address it has.
                self._add(address, server_name=host_of(uri))
            # Another name that had the address may have removed it.
            for address in (mine - found) & self._watches.keys():
                # One in use, or that answers health checks, stays: it may have left the name only to drain.
                if (replica := self._watches[address].replica).num_sessions or replica.is_ready:
                    found.add(address)
                else:
                    await self._remove(address)
            mine = found
            await asyncio.sleep(self._resolve_interval_s)

    def fitting(self, suits: Callable[[InfoT], bool]) -> list[Replica[InfoT]]:
        """Return the ready replicas that suit; see `pick`."""
        return [r for r in self.replicas if r.is_ready and r.info is not None and suits(r.info)]

    def pick(
        self,
        suits: Callable[[InfoT], bool] = lambda _: True,
        *,
        near: str = "",
        unsuited: str = "does not suit",
        without: Collection[Replica[InfoT]] = (),
    ) -> Replica[InfoT]:
        """Return a ready replica that suits, the less busy of two; one that rests or is full only where there
        is no other.

        Args:
            suits: whether what a replica says of itself will do.
            near: URI of another service; a replica at its address, that is in its pod, may map what others
                would have to stream, and goes before those that are not less busy by `NEAR_SESSIONS`.
            unsuited: what the error says of a ready replica that does not suit.
            without: replicas that will not do.

        Raises:
            UnavailableError: no such replica is ready; the message says why for each.
        """
        fitting = [replica for replica in self.fitting(suits) if replica not in without]
        if not fitting:
            name = self.service.rpartition(".")[2]
            raise UnavailableError(
                f"No {name} replica is ready ({self.describe(unsuited)}). Start one, or check the "
                "gateway's addresses.",
                reason="NO_REPLICA",
                retry_after_s=1.0,
            )
        return self._choose(fitting, near)

    def _choose(self, fitting: Sequence[Replica[InfoT]], near: str) -> Replica[InfoT]:
        """Return one of the replicas: the less busy of two near ones, or of two others where that one is much
        less busy.
        """
        standings = {replica: (replica.rests, replica.load.is_full) for replica in fitting}
        best = min(standings.values())
        able = [replica for replica, standing in standings.items() if standing == best]
        beside = [replica for replica in able if _machine(replica.uri) == _machine(near)]
        elsewhere = [replica for replica in able if replica not in beside]
        ranked = [(replica.load.busyness, replica) for replica in self._draw(beside)]
        ranked += [(replica.load.busyness + NEAR_SESSIONS, replica) for replica in self._draw(elsewhere)]
        return min(ranked, key=itemgetter(0))[1]

    def _draw(self, replicas: Sequence[Replica[InfoT]]) -> list[Replica[InfoT]]:
        """Return two of the replicas in any order, or as many as there are."""
        return self._rng.sample(replicas, min(2, len(replicas)))

    def describe(self, unsuited: str = "does not suit") -> str:
        """Describe why replicas are not used, each with its reason."""
        known = {r.uri: r.reason or unsuited for r in self.replicas} | self._unresolved
        return "; ".join(f"{uri}: {reason}" for uri, reason in known.items()) or "none configured"

    async def wait_until_ready(self) -> None:
        """Return once a replica is ready."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(replica.is_ready for replica in self.replicas))

    async def refresh(self) -> None:
        """Ask every ready replica anew how busy it is. Who asks while the answers are fresh, or on their way,
        shares them: however many ask a gateway, its replicas are asked once in a while.
        """
        if time.monotonic() - self._refreshed_at < REFRESH_INTERVAL_S:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        watches = list(self._watches.values())
        await asyncio.gather(*(watch.refresh() for watch in watches if watch.replica.is_ready))
        self._refreshed_at = time.monotonic()

    @property
    def known_infos(self) -> list[InfoT]:
        """What every replica that was ever ready said of itself."""
        return [replica.info for replica in self.replicas if replica.info is not None]

    @property
    def is_known(self) -> bool:
        """Whether a replica was ready at least once, or there is none to wait for."""
        nothing_to_wait_for = not self.replicas and not self._resolving
        return nothing_to_wait_for or bool(self.known_infos)


def _machine(uri: str) -> str:
    """Return a URI without its port; it is the same for every Unix socket."""
    return uri.rpartition(":")[0]
