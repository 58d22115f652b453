"""The thread of a process that runs its model."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

ValueT = TypeVar("ValueT")


class ModelThread:
    """The one thread that loads a model and then runs its engine.

    A daemon, unlike an executor's threads: a process that fails before it closes its engine still ends.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], ValueT]) -> Future[ValueT]:
        """Call `function` on the thread, after what was submitted before."""
        future: Future[ValueT] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def stack(self) -> str:
        """Return where in its code the thread is, for a log."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def close(self, *, wait: bool = True) -> None:
        """End the thread once what was submitted is done, and wait for that."""
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while call := self._calls.get():
            call()
