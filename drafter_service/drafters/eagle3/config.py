"""What the configs of EAGLE-3 checkpoints say: those of the authors, and of vLLM's `speculators`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from drafter_service.drafters.kinds import MOST_LAYERS, kind_of, why_other
from specdec.contract.errors import InvalidArgumentError

_DECODERS: Mapping[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_LINEAR_ROTARIES = ("default", "linear", "llama3")
_AUTHORS_THETA = 10000.0
"""Base of the rotary embedding where the authors' config does not say it, whatever the target has."""


@dataclass(frozen=True, slots=True)
class EagleSettings:
    """What a checkpoint's config says besides the shape of its decoder."""

    layer_ids: tuple[int, ...]
    """Target layers, the first is 0, whose outputs make features; empty: that of the final norm does."""
    vocab_size: int
    norm_before_residual: bool = False
    """Whether the first layer adds to the normed features, rather than to the features."""
    norm_before_fc: bool = False
    """Whether the features side by side have a norm before they are projected."""
    norms_features: bool = False
    """Whether each target layer's output has a norm of its own before that."""
    norm_output: bool = False
    """Whether what goes from a step into the next one has the final norm."""


def read_config(config: Mapping[str, Any], num_target_layers: int) -> tuple[PretrainedConfig, EagleSettings]:
    """Return the decoder's shape and the other settings of a config.json.

    Args:
        num_target_layers: layers of the target; 0: unknown.

    Raises:
        InvalidArgumentError: the checkpoint is of another kind, a value is missing, or the target must be
            known.
    """
    if config.get("speculators_model_type") == "eagle3":
        return _read_speculators(config, num_target_layers)
    if kind_of(config)[1] == "eagle3":
        return _read_authors(config, num_target_layers)
    raise InvalidArgumentError(why_other(config, "eagle3"))


def _read_speculators(
    config: Mapping[str, Any], num_target_layers: int
) -> tuple[PretrainedConfig, EagleSettings]:
    layers = config["transformer_layer_config"]
    decoder = _decoder(layers, layers["model_type"])
    if config.get("norm_before_fc") and config.get("fc_norm"):
        raise InvalidArgumentError("it has both norm_before_fc and fc_norm; it can have one of them.")
    return decoder, EagleSettings(
        _layer_ids(config.get("eagle_aux_hidden_state_layer_ids"), num_target_layers),
        layers["vocab_size"],
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_before_fc=bool(config.get("norm_before_fc", False)),
        norms_features=bool(config.get("fc_norm", False)),
        norm_output=bool(config.get("norm_output", False)),
    )


def _read_authors(
    config: Mapping[str, Any], num_target_layers: int
) -> tuple[PretrainedConfig, EagleSettings]:
    if int(config.get("num_hidden_layers", 1)) != 1:
        raise InvalidArgumentError(
            f"it has {config['num_hidden_layers']} layers; the authors' drafters have one."
        )
    own = {key: value for key, value in config.items() if key != "head_dim"}
    if "rope_theta" not in config and "rope_parameters" not in config:
        own["rope_theta"] = _AUTHORS_THETA
    decoder = _decoder(own, "llama")
    extra = config.get("eagle_config", {})
    if not extra.get("use_aux_hidden_state", True):
        return decoder, EagleSettings((), decoder.vocab_size)
    given = extra.get("eagle_aux_hidden_state_layer_ids", config.get("eagle_aux_hidden_state_layer_ids"))
    return decoder, EagleSettings(_layer_ids(given, num_target_layers), decoder.vocab_size)


def _decoder(config: Mapping[str, Any], model_type: str) -> PretrainedConfig:
    if model_type not in _DECODERS:
        raise InvalidArgumentError(
            f"its layers are of type {model_type!r}; supported are {', '.join(_DECODERS)}."
        )
    decoder = _DECODERS[model_type](**config)
    kind = (getattr(decoder, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _LINEAR_ROTARIES:
        raise InvalidArgumentError(
            f"its rotary embedding is of type {kind!r}; supported are {', '.join(_LINEAR_ROTARIES)}."
        )
    if getattr(decoder, "attention_bias", False) or getattr(decoder, "mlp_bias", False):
        raise InvalidArgumentError("its layers have biases, which the eagle3 drafter does not have.")
    return decoder


def _layer_ids(given: Any, num_target_layers: int) -> tuple[int, ...]:
    """Return the layers whose outputs are read. Both formats name layers by what enters them: 1 is the output
    of layer 0."""
    if given is None:
        if not num_target_layers:
            raise InvalidArgumentError(
                "its config does not say which layers of the target it reads; they follow from the target's "
                "number of layers: give the target's checkpoint with --target."
            )
        given = (2, num_target_layers // 2, num_target_layers - 3)
    layer_ids = tuple(int(layer_id) - 1 for layer_id in given)
    if not layer_ids or min(layer_ids) < 0 or max(layer_ids) > MOST_LAYERS:
        raise InvalidArgumentError(
            f"it must name target layers to read, counted from 1; it has {list(given)}."
        )
    return layer_ids
