"""What the peer `openvino` needs before it runs: an environment of its own, and an export of the model."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from specdec.bench.peers.process import output_of
from specdec.contract.errors import FailedPreconditionError
from specdec.models.embedded import cache_directory
from specdec.models.files import revision

MAKE_TARGET = ".venv/peers/installed"
"""What `make` makes the environment by; it lies in the environment that runs the benchmark."""

WEIGHT_FORMATS = {"bfloat16": "fp16", "float16": "fp16", "float32": "fp32"}
"""How weights are stored in an export, by the data type of the target. OpenVINO makes bf16 of fp16 itself."""


def program(name: str) -> Path:
    """Return the path of a program in the peers' environment.

    Raises:
        FailedPreconditionError: the environment was not made.
    """
    environment = Path(sys.prefix) / "peers"
    if not (environment / "installed").is_file():
        raise FailedPreconditionError(
            f"The peer openvino needs an environment of its own in {environment}, which was not made. Run "
            f"`make {MAKE_TARGET}` in a checkout, or leave openvino out of --peers.",
            reason="PEER_NOT_INSTALLED",
        )
    return environment / "bin" / name


async def exported(folder: Path, name: str, dtype: str, report: Callable[[str], None]) -> Path:
    """Return the folder of a model's export, which is made once and kept in the cache directory.

    Args:
        folder: the model's folder.
        name: the model's name, which the export is kept under.
        dtype: data type of the target.
        report: receives a line of text before a slow step.

    Raises:
        FailedPreconditionError: the environment was not made.
        UnavailableError: the model cannot be exported.
    """
    command = [str(program("optimum-cli")), "export", "openvino", "--model", str(folder)]
    weights = WEIGHT_FORMATS[dtype]
    root = cache_directory() / "openvino"
    directory = root / f"{name.rpartition('/')[2]}-{revision(folder)[:12]}-{weights}"
    if directory.is_dir():
        return directory
    report(f"Exporting {name} to OpenVINO, once: one to three minutes")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-") as scratch:
        made = Path(scratch) / "export"
        task = ("--task", "text-generation-with-past", "--weight-format", weights)
        await output_of([*command, *task, str(made)])
        _keep(made, directory)
    return directory


def _keep(made: Path, directory: Path) -> None:
    try:
        made.rename(directory)
    except OSError:
        # Another run was faster, and its export is as good.
        if not directory.is_dir():
            raise
        shutil.rmtree(made)
