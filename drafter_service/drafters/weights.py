"""Weights of checkpoints that other projects wrote: their files, and heads over a draft vocabulary."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.contract.errors import InvalidArgumentError

_SINGLE, _INDEX, _PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@contextmanager
def reading_config(folder: Path) -> Iterator[None]:
    """Say of what goes wrong with a checkpoint's config.json which folder it is in.

    Raises:
        InvalidArgumentError: in place of any other error.
    """
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{folder}: {error.message}", field="drafter") from error
    except Exception as error:  # a broken config surfaces as many types
        raise InvalidArgumentError(
            f"{folder}/config.json cannot be used: {type(error).__name__}: {error}", field="drafter"
        ) from error


def read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Read all weights of a checkpoint: safetensors, in one file or several, or else PyTorch's own format.

    Raises:
        InvalidArgumentError: there are none, they are damaged, or they are quantised.
    """
    weights = _read_files(folder, device)
    for name, weight in weights.items():
        if weight.ndim > 1 and not weight.is_floating_point():
            raise InvalidArgumentError(
                f"{folder}: {name} is of {weight.dtype}; quantised drafters are not run here.",
                field="drafter",
            )
        if weight.is_floating_point() and not weight.isfinite().all():
            raise InvalidArgumentError(
                f"{folder}: {name} has values that are not finite; the file is damaged, or its training "
                "went wrong.",
                field="drafter",
            )
    return weights


def _read_files(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint.

    Raises:
        InvalidArgumentError: there are none, or they are damaged.
    """
    try:
        if not any((folder / name).is_file() for name in (_SINGLE, _INDEX)) and (folder / _PICKLED).is_file():
            pickled = torch.load(folder / _PICKLED, map_location=device, weights_only=True, mmap=True)
            if not all(isinstance(name, str) and _is_plain(value) for name, value in pickled.items()):
                raise ValueError(f"{_PICKLED} has something else than weights")
            return dict(pickled)
        files = [_SINGLE]
        if (folder / _INDEX).is_file():
            files = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for file in files:
            # A name with a folder in it would lead out of the checkpoint.
            with safe_open(folder / Path(file).name, framework="pt", device=str(device)) as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (
        *(AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError),
        *(SafetensorError, pickle.UnpicklingError),
    ) as error:
        raise InvalidArgumentError(
            f"The weights in {folder} cannot be read: {error}", field="drafter"
        ) from error
    return weights


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def take_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the weights with a prefix out of a checkpoint's, and their prefix away."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def check_rows(name: str, table: Tensor, vocab_size: int) -> None:
    """Refuse a table that lacks rows for some of the vocabulary's tokens.

    Args:
        vocab_size: tokens that a row is looked up for; 0: unknown.

    Raises:
        ValueError: it lacks rows.
    """
    if len(table) < vocab_size:
        raise ValueError(f"{name} has {len(table)} rows for a vocabulary of {vocab_size} tokens")


def take_head(
    folder: Path, weights: dict[str, Tensor], vocab_size: int, hidden_size: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take head and draft vocabulary out of the weights, both in order of token ids, and that order.

    Args:
        vocab_size: tokens the drafter knows; 0: unknown.

    Returns:
        The head [draft_vocab_size, hidden_size], None: there is none; the tokens of its rows, None: all; and
        which rows they were, None: they stayed where they were.

    Raises:
        InvalidArgumentError: they do not fit each other.
    """
    lm_head, offsets = weights.pop("lm_head.weight", None), weights.pop("d2t", None)
    if lm_head is None:
        if offsets is not None:
            raise InvalidArgumentError(
                f"{folder}: it has d2t, which says what tokens its head is for, and no lm_head.",
                field="drafter",
            )
        return None, None, None
    if lm_head.ndim != 2 or not len(lm_head) or lm_head.shape[1] != hidden_size:
        raise InvalidArgumentError(
            f"{folder}: lm_head.weight is {list(lm_head.shape)}; it must have rows of the drafter's "
            f"{hidden_size} elements.",
            field="drafter",
        )
    if offsets is not None:
        token_ids = _mapped_tokens(folder, offsets, len(lm_head), vocab_size)
        order = token_ids.argsort()
        return lm_head[order], token_ids[order], order
    if len(lm_head) < vocab_size:
        raise InvalidArgumentError(
            f"{folder}: its head has {len(lm_head)} rows for a vocabulary of {vocab_size} tokens, and no d2t "
            "that says which tokens they are for.",
            field="drafter",
        )
    # More rows than tokens are padding.
    return lm_head[: vocab_size or None], None, None


def _mapped_tokens(folder: Path, offsets: Tensor, num_rows: int, vocab_size: int) -> Tensor:
    """Return the token of each row of a head [num_rows].

    Args:
        offsets: how far each row's token is from the row's index [num_rows].

    Raises:
        InvalidArgumentError: the rows do not have different tokens of the vocabulary.
    """
    right = offsets.shape == (num_rows,)
    if right:
        token_ids = torch.arange(num_rows, device=offsets.device) + offsets.long()
        in_range = token_ids.min() >= 0 and not (vocab_size and token_ids.max() >= vocab_size)
        right = bool(in_range) and len(token_ids.unique()) == num_rows
    if not right:
        raise InvalidArgumentError(
            f"{folder}: d2t does not map the {num_rows} rows of the head to as many tokens.", field="drafter"
        )
    return token_ids
