"""A model's files, tokenizer and vocabulary fingerprint. This module does not import torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from specdec.contract.errors import InvalidArgumentError, NotFoundError
from specdec.models.digests import file_digest
from specdec.models.embedded import DEFAULT_MODEL, MODEL_ID, prepare_default_model

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(model: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Find the local folder of a model; the files of a hub id are fetched.

    Args:
        model: what the operator asked for: "default", a folder or a hub id.
        patterns: which files of a hub id are fetched; of weights these are only safetensors.

    Raises:
        NotFoundError: the model does not exist or cannot be fetched.
    """
    if model == DEFAULT_MODEL:
        return prepare_default_model()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path} has no config.json; pass a Hugging Face model folder.")
        return path
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise NotFoundError(
            f"Model {model!r} is neither a folder nor a hub id. Pass a folder with config.json and "
            f"safetensors, a hub id such as google/gemma-4-31B-it, or {DEFAULT_MODEL!r}."
        )
    return _fetch(model, patterns)


def _fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many unrelated types
        raise NotFoundError(
            f"Model {hub_id!r} is not a local folder and could not be fetched from the hub: {error}"
        ) from error


def model_id(model: str) -> str:
    """Return the name by which peers know a model: its hub id or the name of its folder."""
    if model == DEFAULT_MODEL:
        return MODEL_ID
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def revision(folder: Path) -> str:
    """Identify the weights in a model folder by the hub's commit, or by a digest if it is not from a hub.

    The digest covers the name and the whole content of every file of configuration or weights, so that two
    models with equal revisions give the same answers. `specdec.models.digests` says what that costs.
    """
    if folder.parent.name == "snapshots" and _HUB_COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\t{file_digest(path)}\n".encode())
    return digest.hexdigest()[:40]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        NotFoundError: the folder has no tokenizer.json.
        InvalidArgumentError: the tokenizer.json cannot be parsed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no tokenizer.json; save a fast tokenizer there with tokenizer.save_pretrained()."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidArgumentError(f"{path} cannot be parsed: {error}; save the tokenizer again.") from error


def vocabulary_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a vocabulary: `id TAB token NEWLINE` for every token in id order, as UTF-8.

    Two models with equal fingerprints may exchange token ids. The fingerprint of a folder without a tokenizer
    is made of its vocabulary size alone.
    """
    digest = hashlib.sha256()
    if (folder / "tokenizer.json").is_file():
        vocabulary = load_tokenizer(folder).get_vocab(with_added_tokens=True)
        for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{token_id}\t{token}\n".encode())
    else:
        config = json.loads((folder / "config.json").read_text())
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        digest.update(f"vocab_size {size}\n".encode())
    return digest.hexdigest()
