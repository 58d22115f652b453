"""The log of a training run, and the curves that are drawn of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.cli import train
from drafter_service.training.log import LOG_FILE, TrainingLog, read_log
from specdec.bench import plots
from specdec.contract.errors import InvalidArgumentError

ACCEPTANCE = HeldOutAcceptance.of([[2, 1, 0, 1]], 2)


def write_run(folder: Path) -> Path:
    folder.mkdir()
    with TrainingLog(folder / LOG_FILE, 0) as log:
        for step in range(1, 4):
            log.add_step(step, 500 * step, 2.0 * step, 3.0 / step)
        log.add_acceptance(3, 1500, ACCEPTANCE)
    return folder


def curve(*folders: Path, out: Path) -> Result:
    return CliRunner().invoke(train, ["curve", *map(str, folders), "--out", str(out)])


def test_a_log_says_loss_and_acceptance_by_tokens(tmp_path: Path) -> None:
    lines = read_log(write_run(tmp_path / "run") / LOG_FILE)
    assert lines[1] == {"step": 2, "num_tokens": 1000, "seconds": 4.0, "loss": 1.5}
    assert lines[3] == {
        "step": 3,
        "num_tokens": 1500,
        "acceptance_length": ACCEPTANCE.length,
        "acceptance_per_position": list(ACCEPTANCE.per_position),
    }


def test_a_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    with TrainingLog(path, 0) as log:
        log.add_step(1, 500, 2.0, 3.0)
        assert [line["step"] for line in read_log(path)] == [1]


def test_a_resumed_run_keeps_what_it_did_and_a_new_one_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / LOG_FILE
    with path.open("a") as file:
        file.write('{"step": 4, "num')  # by a run that was killed
    with TrainingLog(path, 2) as log:
        log.add_step(3, 1501, 9.0, 0.5)
    assert [(line["step"], line["num_tokens"]) for line in read_log(path)] == [
        (1, 500),
        (2, 1000),
        (3, 1501),
    ]
    with TrainingLog(path, 0):
        assert read_log(path) == []


def test_a_resumed_run_whose_log_is_gone_begins_another(tmp_path: Path) -> None:
    with TrainingLog(tmp_path / LOG_FILE, 7) as log:
        log.add_step(8, 4000, 1.0, 1.0)
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [8]


@pytest.mark.parametrize("content", ["{\n", "[]\n", '{"step": 1}\n', '"step num_tokens"\n'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / LOG_FILE
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match="not a log of `specdec train mtp` or `dflash`"):
        read_log(path)


@pytest.mark.skipif(not plots.has_matplotlib(), reason="matplotlib is not installed")
def test_runs_are_drawn_into_one_plot(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    lines = (second / LOG_FILE).read_text().splitlines(keepends=True)
    (second / LOG_FILE).write_text("".join(lines[:3]))  # no look at the held-out answers yet
    result = curve(first, second, out=tmp_path / "plots" / "curve.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(lines[3])["acceptance_length"] == ACCEPTANCE.length


@pytest.mark.skipif(not plots.has_matplotlib(), reason="matplotlib is not installed")
def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = curve(tmp_path / "empty", out=tmp_path / "curve.png")
    assert result.exit_code == 2
    assert f"The training log {tmp_path / 'empty' / LOG_FILE} cannot be read" in result.output
    assert not (tmp_path / "curve.png").exists()
