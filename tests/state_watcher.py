"""A process that maps a session's state and reads it over and over: python -m tests.state_watcher.

It knows of state what the contract says and nothing of the code that reads it elsewhere. One JSON object per
line of input: first {"tensors": [...]}, then {"rows": [...], "length": N} whenever more may be read, with the
rows that the session took since. It prints a line when it has begun, and at the end of input how many rows it
compared with what it first read, and how many of them differed.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from specdec.contract.target_state import GENERATIONS, SharedMemory, TargetStateRef
from specdec.runtime.kv_slots import BLOCK_TOKENS


def describe(ref: TargetStateRef) -> dict[str, Any]:
    """Return the first line of input for a session: where its tensors are."""
    tensors = []
    for tensor in ref.tensors:
        if tensor.name == GENERATIONS:
            continue
        assert isinstance(tensor.storage, SharedMemory)
        assert tensor.dtype == "float32"
        row_bytes = 4
        for extent in tensor.shape[1:]:
            row_bytes *= extent
        tensors.append([tensor.storage.path, tensor.storage.offset, tensor.shape[0], row_bytes])
    return {"tensors": tensors}


def describe_progress(ref: TargetStateRef) -> dict[str, Any]:
    """Return a later line of input: the slots of the handle's blocks in order, and how much may be read."""
    first_rows = (block * BLOCK_TOKENS for block in ref.block_ids)
    rows = [first + offset for first in first_rows for offset in range(BLOCK_TOKENS)]
    return {"rows": rows, "length": ref.cached_length}


class Watcher:
    """What was first read, and whether it is still there."""

    def __init__(self, tensors: Sequence[tuple[str, int, int, int]]) -> None:
        self._tensors = [
            numpy.memmap(path, numpy.uint8, "r", offset, (num_rows, row_bytes))
            for path, offset, num_rows, row_bytes in tensors
        ]
        self._rows = numpy.empty(0, numpy.int64)
        self._known: list[NDArray[numpy.uint8]] = [self._read(tensor, 0) for tensor in self._tensors]
        self.num_compared = 0
        self.num_changed = 0

    def _read(self, tensor: Any, length: int) -> NDArray[numpy.uint8]:
        read: NDArray[numpy.uint8] = tensor[self._rows[:length]]
        return read

    def extend(self, rows: Sequence[int], length: int) -> None:
        """Permit reading positions below `length` from now on; `rows` follow those that are known."""
        self._rows = numpy.concatenate([self._rows, numpy.array(rows, numpy.int64)])
        assert len(self._rows) >= length
        for index, tensor in enumerate(self._tensors):
            known = len(self._known[index])
            read = self._read(tensor, length)
            assert (read[known:] != 0).any()  # else what is compared would be nothing
            self._known[index] = numpy.concatenate([self._known[index], read[known:]])

    def compare(self) -> None:
        """Read all that is known again."""
        for tensor, known in zip(self._tensors, self._known, strict=True):
            same = self._read(tensor, len(known)) == known
            self.num_compared += len(known)
            self.num_changed += int((~same.all(axis=-1)).sum())


def main() -> None:
    """Watch until the input ends."""
    lines: queue.Queue[str] = queue.Queue()
    watcher = Watcher(**json.loads(sys.stdin.readline()))
    watcher.extend(**json.loads(sys.stdin.readline()))
    print("watching", flush=True)

    def feed() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")

    threading.Thread(target=feed, daemon=True).start()
    while True:
        watcher.compare()
        while not lines.empty():
            line = lines.get()
            if not line:
                watcher.compare()
                print(json.dumps([watcher.num_compared, watcher.num_changed]))
                return
            watcher.extend(**json.loads(line))


if __name__ == "__main__":
    main()
