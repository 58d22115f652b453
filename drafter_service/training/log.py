"""The log of a training run: a JSON object per line, for each step and each look at the held-out answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from drafter_service.training.acceptance import HeldOutAcceptance
from specdec.cli.files import read_text
from specdec.contract.errors import InvalidArgumentError

LOG_FILE = "training_log.jsonl"


class TrainingLog:
    """Writes the log of a run. Use as `with`.

    Args:
        path: the file; what another run left in it is dropped.
        step: the last step that was done before; a resumed run keeps the lines up to it.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= step] if step and path.is_file() else []
        self._file = path.open("w", encoding="utf-8", buffering=1)
        for line in kept:
            self._write(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_step(self, step: int, num_tokens: int, seconds: float, loss: float) -> None:
        """Add what a step of training did.

        Args:
            num_tokens: answer tokens trained on so far; each counts once per pass.
            seconds: how long the run has trained.
            loss: its moving average.
        """
        self._write({"step": step, "num_tokens": num_tokens, "seconds": seconds, "loss": loss})

    def add_acceptance(self, step: int, num_tokens: int, acceptance: HeldOutAcceptance) -> None:
        """Add the acceptance on held-out answers after so many steps and tokens."""
        self._write(
            {
                "step": step,
                "num_tokens": num_tokens,
                "acceptance_length": acceptance.length,
                "acceptance_per_position": list(acceptance.per_position),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; one that a killed run left unfinished is not among them.

    Raises:
        InvalidArgumentError: the file is not there, or is not a training log.
    """
    whole, _, _ = read_text(path, "The training log").rpartition("\n")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all({"step", "num_tokens"} <= line.keys() for line in lines):
            raise ValueError("a line has no step or no num_tokens")
    except (ValueError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{path} is not a log of `specdec train mtp` or `dflash`: {error}"
        ) from error
    return lines
