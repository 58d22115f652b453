"""What MTP and DFlash drafters read of a model, and the ways to get at it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import TargetStateSpec
from specdec.models.files import resolve_model

if TYPE_CHECKING:
    from specdec.state.view import Projection

HANDLE, STREAM = "handle", "stream"
_NUM_DFLASH_LAYERS = 5


@dataclass(frozen=True, slots=True)
class Need:
    """What one kind of drafter reads, and the ways to get at it."""

    name: str
    spec: TargetStateSpec
    transports: tuple[str, ...] = (HANDLE, STREAM)
    projection: Projection | None = None


def _dimensions(model: str) -> tuple[int, int]:
    """Return the number of layers and the hidden size of a model."""
    config = json.loads((resolve_model(model, ("config.json",)) / "config.json").read_text())
    text_config = config.get("text_config", config)
    return text_config["num_hidden_layers"], text_config["hidden_size"]


def needs_of(model: str, dtype: str) -> list[Need]:
    """Return what the drafters of a model read.

    Args:
        dtype: data type of the target state.

    Raises:
        InvalidArgumentError: the model has a single layer.
    """
    num_layers, hidden_size = _dimensions(model)
    layer_ids = dflash_layers(num_layers)
    projection = _random_projection(len(layer_ids) * hidden_size, hidden_size, dtype)
    dflash = TargetStateSpec(hidden_layer_ids=layer_ids)
    mtp = TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True)
    projected = replace(dflash, projection=projection.info)
    return [
        Need("MTP", mtp),
        Need("DFlash", dflash),
        Need("DFlash projected", projected, (STREAM,), projection),
    ]


def dflash_layers(num_layers: int) -> tuple[int, ...]:
    """Return five layers, or all where there are fewer, spread evenly over all but the last.

    Raises:
        InvalidArgumentError: there is a single layer.
    """
    if num_layers < 2:
        raise InvalidArgumentError(
            "The model has a single layer; DFlash drafters read layers before the last."
        )
    last = num_layers - 2
    count = min(_NUM_DFLASH_LAYERS, last + 1)
    return tuple(round(index * last / max(1, count - 1)) for index in range(count))


def _random_projection(input_size: int, output_size: int, dtype: str) -> Projection:
    import torch

    from specdec.state.view import Projection

    generator, torch_dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    fc = torch.randn(output_size, input_size, generator=generator, dtype=torch_dtype)
    return Projection(fc.mul_(input_size**-0.5), torch.ones(output_size, dtype=torch_dtype), 1e-6)
