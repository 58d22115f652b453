"""What a run has measured so far, written as it is measured: an interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from specdec.bench.records import RequestRecord
from specdec.bench.run import Block
from specdec.contract.errors import InvalidArgumentError

REQUESTS_FILE = "requests.jsonl"
SETTINGS_FILE = "settings.json"

Settings = dict[str, Any]
BlockKey = tuple[str, int, int]
"""Method, concurrency and number of a block, which tell it from all others of its run."""


class Journal:
    """The files of one run: its settings, and the records of each block as soon as it ends.

    Args:
        directory: folder for the files, which is made if it does not exist.
        resume: whether the run goes on where one with the same settings was interrupted.
    """

    def __init__(self, directory: Path, *, resume: bool = False) -> None:
        self._directory, self._resume = directory, resume

    @property
    def _requests(self) -> Path:
        return self._directory / REQUESTS_FILE

    def begin(self, settings: Settings, blocks: Sequence[Block]) -> list[RequestRecord]:
        """Return what was measured before, of blocks without a failed request, and note the settings.

        Raises:
            InvalidArgumentError: the run in the folder had other settings, or they are not known.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = self._earlier(settings, blocks) if self._resume else []
        (self._directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # Not in place: an interruption now must not lose what is there.
        new = self._requests.with_suffix(".new")
        new.write_text(_lines(kept), encoding="utf-8")
        new.replace(self._requests)
        return kept

    def keep(self, records: Iterable[RequestRecord]) -> None:
        """Add the records of a block that has ended."""
        with self._requests.open("a", encoding="utf-8") as file:
            file.write(_lines(records))

    def _earlier(self, settings: Settings, blocks: Sequence[Block]) -> list[RequestRecord]:
        if not self._requests.exists():
            return []
        self._require_same(settings)
        found: dict[BlockKey, list[RequestRecord]] = {}
        for record in _records(self._requests):
            found.setdefault((record.method, record.concurrency, record.pair), []).append(record)
        return [
            record
            for block in blocks
            if _is_measured(block, records := found.get(key_of(block), []))
            for record in records
        ]

    def _require_same(self, settings: Settings) -> None:
        try:
            before = json.loads((self._directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InvalidArgumentError(
                f"The settings of the run in {self._directory} are not known, so it cannot go on; leave out "
                "--resume to start anew, or name another folder with --out.",
                field="resume",
            ) from None
        now = json.loads(json.dumps(settings))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            listed = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in names)
            raise InvalidArgumentError(
                f"The run in {self._directory} had other settings ({listed}); give it the same to go on, "
                "leave out --resume to start anew, or name another folder with --out.",
                field="resume",
            )


def key_of(block: Block) -> BlockKey:
    """Return what tells a block from all others of its run."""
    return block.contender.method, block.concurrency, block.pair


def _is_measured(block: Block, records: Sequence[RequestRecord]) -> bool:
    return len(records) == block.num_requests and all(record.answer for record in records)


def _lines(records: Iterable[RequestRecord]) -> str:
    return "".join(json.dumps(record.to_json()) + "\n" for record in records)


def _records(path: Path) -> Iterable[RequestRecord]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # the last line may be cut; its block is run again
            yield RequestRecord.from_json(json.loads(line))
