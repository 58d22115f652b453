"""Passes of peers for a program that is not asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Self

from specdec.bench.peers.engines import PeerSetup, PeerTarget
from specdec.bench.peers.process import PeerBackend


class PeerPasses:
    """The workers of peers that run passes, for as long as a `with` block lasts.

    Args:
        target: what the peers are to run.
        peers: names of the peers; there may be none.
        report: receives a line of text before a slow step.
    """

    def __init__(self, target: PeerTarget, peers: Sequence[str], report: Callable[[str], None]) -> None:
        self.names = tuple(peers)
        self._target = target
        self._report = report
        self._workers: dict[str, PeerBackend] = {}
        self._started = AsyncExitStack()
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._runner)
            stack.callback(lambda: self._runner.run(self._started.aclose()))
            self._runner.run(self._start())
            stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._runner:
            self._runner.run(self._started.__aexit__(*error))

    async def _start(self) -> None:
        if not self.names:
            return
        setup = PeerSetup(self._target, self._report)
        workers = await setup.start_passes(self.names, self._started)
        self._workers = {worker.name: worker for worker in workers}

    def descriptions(self) -> dict[str, Any]:
        """Return what each peer says of itself, by its name."""
        return {name: worker.description for name, worker in self._workers.items()}

    def fill_caches(self, context_token_ids: Sequence[int]) -> None:
        """Fill the caches of all peers."""
        for worker in self._workers.values():
            self._runner.run(worker.fill_cache(context_token_ids))

    def run(self, name: str, token_ids: Sequence[int]) -> int:
        """Run a pass of a peer and return its time, nanoseconds."""
        return self._runner.run(self._workers[name].time_pass(token_ids))
