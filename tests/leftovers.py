"""What this process holds of the system: open files, connections and ports, threads, and memory it shares."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import psutil

WAIT_S = 20.0
"""gRPC closes connections, and asyncio ends threads, a moment after it was told to."""

_LOOK_S = 0.02

_FOREIGN_THREAD = re.compile(r"tqdm_monitor|(Thread|ThreadPoolExecutor|Dummy)-\d|asyncio_\d")
"""What libraries call the threads that they start when they need one, and keep."""


def held(*folders: Path) -> Counter[str]:
    """Return what the process holds now, and how often.

    Args:
        folders: the files in them count as held, and so does memory that is mapped from them.
    """
    things = [*_descriptors(), *_sockets(), *_threads()]
    for folder in folders:
        things += [f"file {path}" for path in folder.rglob("*")]
        things += _mappings(folder)
    return Counter(things)


@contextmanager
def nothing_left(*folders: Path) -> Iterator[None]:
    """Fail unless the process holds after the block what it held before, and no more.

    Args:
        folders: see `held`.
    """
    before = held(*folders)
    yield
    for _ in _looks(before, folders):
        time.sleep(_LOOK_S)


@asynccontextmanager
async def nothing_left_behind(*folders: Path) -> AsyncIterator[None]:
    """Check the same on an event loop, which runs on meanwhile: what is closed there may need it to end."""
    before = held(*folders)
    yield
    for _ in _looks(before, folders):
        await asyncio.sleep(_LOOK_S)


def connections_to(address: str) -> set[int]:
    """Return the local ports of this process's connections to a server."""
    port = int(address.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    return {
        connection.laddr.port
        for connection in connections
        if connection.raddr and connection.raddr.port == port
    }


def _looks(before: Counter[str], folders: Sequence[Path]) -> Iterator[None]:
    """Pause before each further look, until nothing is left or the time is over."""
    deadline = time.monotonic() + WAIT_S
    while left := held(*folders) - before:
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {', '.join(sorted(left.elements()))}")
        gc.collect()  # what only a traceback keeps alive is not a leftover
        yield


def _descriptors() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            target = str(descriptor.readlink())
            if target.startswith("/") and "/site-packages/" not in target:  # fonts, of matplotlib
                yield f"open {target}"


def _mappings(folder: Path) -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f" {folder}/" in line:
            yield f"mapped {line.split(maxsplit=5)[5]}"


def _sockets() -> Iterator[str]:
    for connection in psutil.Process().net_connections("all"):
        if isinstance(connection.laddr, tuple):
            yield f"socket {connection.laddr} {connection.raddr}"
        elif connection.laddr:  # pairs without a path are those of event loops
            yield f"socket {connection.laddr}"


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if not _FOREIGN_THREAD.match(thread.name):
            yield f"thread {thread.name}"
