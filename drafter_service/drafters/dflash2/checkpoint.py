"""DFlash 2 checkpoints, as z-lab and vLLM's `speculators` write them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import MuseGlimmerAssistantConfig

from drafter_service.drafters.dflash.checkpoint import Kind, Parts, Source
from drafter_service.drafters.dflash.config import DFlashSettings, read_speculators, read_z_lab
from drafter_service.drafters.dflash2.convolution import BlockRows, ShortConvolution, convolved
from drafter_service.drafters.dflash2.selector import Selector
from drafter_service.drafters.kinds import kind_of, why_other
from drafter_service.drafters.weights import take_weights
from specdec.contract.errors import InvalidArgumentError

_SUBLAYERS = ("attention_conv", "mlp_conv")


def read_config(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    """Return the decoder's shape and the other settings of a config.json.

    Raises:
        InvalidArgumentError: the checkpoint is of another kind, or a value is missing.
    """
    if config.get("speculators_model_type") == "dflash2":
        # Said nowhere, its sliding layers see both ways.
        return read_speculators({"sliding_window_non_causal": True, **config})
    if kind_of(config)[1] == "dflash2":
        return read_z_lab(config)
    raise InvalidArgumentError(why_other(config, "dflash2"))


def take_parts(source: Source) -> Parts:
    """Take selector and convolutions out of a checkpoint's weights.

    Raises:
        KeyError, ValueError: weights or settings are missing, or do not fit.
    """
    own = {**source.config, **source.config.get("dflash_config", {})}
    selector = Selector.of(
        take_weights(source.weights, "candidate_selector."),
        int(own["selector_top_k"]),
        int(own["selector_rank"]),
        (source.settings.vocab_size, source.hidden_size),
    )
    rows = BlockRows()
    taps, group_size = int(own["conv_kernel_size"]), int(own["conv_group_size"])
    changes = []
    for layer in range(len(source.settings.masks)):
        names = [f"layers.{layer}.{sublayer}" for sublayer in _SUBLAYERS]
        taken = {name: take_weights(source.weights, f"{name}.") for name in names}
        weights = {f"{name}.{key}": value for name, own in taken.items() for key, value in own.items()}
        first, second = (ShortConvolution.of(weights, name, group_size, rows) for name in names)
        if {first.base.shape, second.base.shape} != {(2, taps, source.hidden_size)}:
            raise ValueError(f"the convolutions of layer {layer} do not have {taps} taps")
        changes.append(partial(convolved, first, second))
    return Parts(selector, changes, rows.begin)


DFLASH2 = Kind("dflash2", read_config, take_parts)
