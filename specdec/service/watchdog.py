"""Watches a service's engine: a step that hangs takes the service out of use, and in the end its process.

Health checks are answered by the event loop, which is well while the engine's thread hangs in native code.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""Exit code of a process that ends because its engine hangs: an internal software error, by sysexits.h."""
TOKENS_PER_TIMEOUT = 64
"""A step of more tokens, which reads prompts, has as many times longer."""
_TIMEOUTS_TO_THE_END = 3
_LONGEST_POLL_S = 1.0


class WatchedEngine(Protocol):
    """What the watchdog needs of an engine."""

    def step_under_way(self) -> tuple[float, int]:
        """Return how long the step under way has run, seconds, and its tokens; (0, 0): no step runs."""

    def give_up_step(self) -> str:
        """Fail the work that waits for the step; return where in its code the step is."""


class Watchdog:
    """Looks at an engine every now and then until it is closed.

    Args:
        timeout_s: longest time of a step of up to 64 tokens, seconds; 0: nothing is watched.
        set_serving: reports whether the service may be given work.
        before_the_end: removes what a process that ends at once would leave behind.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        *,
        timeout_s: float,
        set_serving: Callable[[bool], None],
        before_the_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._set_serving = set_serving
        self._before_the_end = before_the_end
        self._hangs = False
        self._watching = asyncio.ensure_future(self._watch()) if timeout_s else None

    async def close(self) -> None:
        """Watch no longer."""
        if self._watching:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(_LONGEST_POLL_S, self._timeout_s / 4))
            seconds, num_tokens = self._engine.step_under_way()
            limit_s = self._timeout_s * max(1.0, num_tokens / TOKENS_PER_TIMEOUT)
            if seconds > _TIMEOUTS_TO_THE_END * limit_s:
                self._end(seconds)
            self._note(seconds > limit_s, seconds, num_tokens)

    def _note(self, hangs: bool, seconds: float, num_tokens: int) -> None:
        if hangs == self._hangs:
            return
        self._hangs = hangs
        if hangs:
            extra = {"seconds": seconds, "tokens": num_tokens, "stack": self._engine.give_up_step()}
            logger.error("the engine hangs; its sessions are given up", extra=extra)
        else:
            logger.warning("the engine goes on")
        self._set_serving(not hangs)

    def _end(self, seconds: float) -> NoReturn:
        logger.critical("the engine hangs; the process ends", extra={"seconds": seconds})
        self._before_the_end()
        logging.shutdown()
        os._exit(EXIT_CODE)
