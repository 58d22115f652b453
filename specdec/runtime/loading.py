"""Load a causal LM for serving, and set the process up for it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import model_id, resolve_model, revision, vocabulary_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM in memory and how peers know it."""

    model: PreTrainedModel
    model_id: str
    vocabulary_fingerprint: str
    eos_token_ids: tuple[int, ...]
    revision: str
    """Which weights these are, see `specdec.models.files.revision`."""
    folder: Path
    """Where its files are."""


def load_causal_lm(
    model: str,
    *,
    dtype: str,
    device: str,
    threads: int = 0,
    optional_weights: Set[str] = frozenset(),
) -> LoadedModel:
    """Load a model by folder, hub id or "default".

    Args:
        threads: CPU threads of this process's models; 0: as torch chooses.
        optional_weights: names the checkpoint may lack; they have random values then.

    Raises:
        NotFoundError: there is no such model.
        InvalidArgumentError: it is not a causal LM, its files are damaged, or the device is not there.
    """
    folder = resolve_model(model)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # What a checkpoint lacks is checked below; transformers' own report of it would be in the way of logs.
    transformers.utils.logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    target = usable_device(device)
    _check_is_causal_lm(folder)
    try:
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as many types
        raise InvalidArgumentError(
            f"The model in {folder} cannot be loaded: {type(error).__name__}: {error}", field="model"
        ) from error
    if missing := sorted(set(report["missing_keys"]) - optional_weights):
        # transformers fills them with random numbers and goes on.
        raise InvalidArgumentError(
            f"The checkpoint in {folder} lacks {len(missing)} weights of a {type(loaded).__name__}, "
            f"{missing[0]} for one: it is damaged, or was saved from another kind of model.",
            field="model",
        )
    return LoadedModel(
        model=loaded.to(target).eval().requires_grad_(False),
        model_id=model_id(model),
        vocabulary_fingerprint=vocabulary_fingerprint(folder),
        eos_token_ids=_eos_token_ids(loaded),
        revision=revision(folder),
        folder=folder,
    )


def usable_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InvalidArgumentError: it is not there, or holds no values.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(0).item()
    except Exception as error:  # each backend has a type of its own for its absence
        raise InvalidArgumentError(
            f"Device {name!r} cannot be used; give cpu, or a GPU such as cuda:0. ({error})", field="device"
        ) from error
    return device


def _check_is_causal_lm(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # an unknown or broken config surfaces as many types
        raise InvalidArgumentError(f"{folder}/config.json cannot be used: {error}", field="model") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InvalidArgumentError(
            f"{folder} holds a {config.model_type!r} model, which is not a causal LM; the services run "
            "models that AutoModelForCausalLM loads.",
            field="model",
        )


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
