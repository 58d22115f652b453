"""The first weights of a drafter: the target's last layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_EMBEDDING_SHARE, _HIDDEN_SHARE = 0.3, 0.06
"""Sizes of the first layer's inputs, relative to the residual stream that it reads in the target."""
_INITIAL_SHARPNESS = 0.3
"""Factor of the first logits: untrained layers should not be sure."""


@torch.no_grad()
def warm_start(assistant: PreTrainedModel, target: PreTrainedModel, token_ids: Sequence[int]) -> float:
    """Start an assistant's layers from the target's last layers, as far as these have the same modules.

    Norms around queries and outputs that the target lacks start at the size that its values have on a text.

    Args:
        token_ids: the text.

    Returns:
        The factor that brings the target's last hidden states to unit size.
    """
    decoder: Any = target.get_decoder()
    layers = list(assistant.model.layers)
    sources = list(decoder.layers)[-len(layers) :]
    before = list(decoder.layers)[-len(layers) - 1]
    watched = [decoder.norm, before]
    for source in sources:
        watched += _there(source, "self_attn.q_proj", "self_attn", "mlp")
    sizes = _output_sizes(target, watched, token_ids)
    for layer, source in zip(layers, sources, strict=True):
        for name, parameter in layer.named_parameters():
            _set(parameter, _counterpart(source, name, sizes))
    _set(assistant.model.norm.weight, _norm_weight(decoder.norm) * _INITIAL_SHARPNESS)
    hidden_scale = 1.0 / sizes[decoder.norm]
    width = target.config.get_text_config().hidden_size
    if assistant.pre_projection.weight.shape == (width, 2 * width):
        # The layers expect the token's embedding in the residual stream, and a trace of the state before it.
        both = torch.cat([torch.eye(width) * _EMBEDDING_SHARE, torch.eye(width) * _HIDDEN_SHARE], dim=1)
        assistant.pre_projection.weight.copy_(both * sizes[before])
    if assistant.post_projection.weight.shape[0] == assistant.post_projection.weight.shape[1]:
        nn.init.eye_(assistant.post_projection.weight).mul_(hidden_scale)
    return hidden_scale


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Factors that bring the inputs of a DFlash drafter to the sizes that its first weights expect."""

    hidden: tuple[float, ...]
    """Factors of the target's hidden states, layer by layer."""
    embedding: float
    """Factor of the target's embeddings, on top of the target's own factor."""


@torch.no_grad()
def warm_start_block(
    drafter: Any, target: PreTrainedModel, layer_ids: Sequence[int], token_ids: Sequence[int]
) -> BlockScales:
    """Start a DFlash drafter's layers from the target's last ones, its context from the last of `layer_ids`.

    Args:
        drafter: a MuseGlimmerAssistantModel as wide as the target.
        layer_ids: target layers whose hidden states are the context, ascending.
        token_ids: a text on which sizes are measured.
    """
    decoder: Any = target.get_decoder()
    layers = list(drafter.layers)
    sources = list(decoder.layers)[-len(layers) :]
    before = list(decoder.layers)[-len(layers) - 1]
    embedding: Any = target.get_input_embeddings()
    watched = [embedding, before, *(decoder.layers[layer_id] for layer_id in layer_ids)]
    for source in sources:
        watched += _there(source, "self_attn.q_proj", "self_attn.k_proj")
    sizes = _output_sizes(target, watched, token_ids)
    for layer, source in zip(layers, sources, strict=True):
        for name, parameter in layer.named_parameters():
            _set(parameter, _block_counterpart(source, name, sizes))
    _set(drafter.norm.weight, _norm_weight(decoder.norm) * _INITIAL_SHARPNESS)
    for norm in _there(sources[0], "input_layernorm"):
        _set(drafter.encoder.output_norm_enc.weight, _norm_weight(norm))
    width = drafter.config.hidden_size
    drafter.encoder.fc.weight.zero_()
    drafter.encoder.fc.weight[:, -width:] = torch.eye(width)
    return BlockScales(
        tuple(1.0 / sizes[decoder.layers[layer_id]] for layer_id in layer_ids),
        _EMBEDDING_SHARE * sizes[before] / sizes[embedding],
    )


def _block_counterpart(source: Any, name: str, sizes: dict[nn.Module, float]) -> Tensor | float | None:
    """Return the start of a DFlash layer's weight: a target layer's same weight, a size, or None."""
    path, attention = name.removesuffix(".weight"), source.self_attn
    if path == "post_attention_layernorm" and hasattr(source, "pre_feedforward_layernorm"):
        path = "pre_feedforward_layernorm"
    if path == "self_attn.q_norm" and not hasattr(attention, "q_norm"):
        # A DFlash layer scales by the root of the dimension itself.
        scale = float(attention.scaling) * math.sqrt(attention.head_dim)
        return _size(sizes, source, "self_attn.q_proj", scale)
    if path == "self_attn.k_norm" and not hasattr(attention, "k_norm"):
        return _size(sizes, source, "self_attn.k_proj")
    return _weight(source, path)


def _output_sizes(
    model: PreTrainedModel, modules: Sequence[nn.Module], token_ids: Sequence[int]
) -> dict[nn.Module, float]:
    """Return the root mean square of each module's output, as its median over the tokens of a text.

    The first tokens of a text have states that are many times larger than all others.
    """
    sizes: dict[nn.Module, float] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        sizes[module] = values.float().square().mean(-1).sqrt().median().item()

    hooks = [module.register_forward_hook(note) for module in modules]
    model(input_ids=torch.tensor([list(token_ids)], device=model.device))
    for hook in hooks:
        hook.remove()
    return sizes


def _counterpart(source: Any, name: str, sizes: dict[nn.Module, float]) -> Tensor | float | None:
    """Return the start of an assistant layer's weight: a target layer's same weight, a size, or None."""
    has_outer_norms = hasattr(source, "pre_feedforward_layernorm")
    path = name.removesuffix(".weight")
    if path == "self_attn.q_norm" and not hasattr(source.self_attn, "q_norm"):
        return _size(sizes, source, "self_attn.q_proj", float(source.self_attn.scaling))
    if not has_outer_norms:
        if path == "post_attention_layernorm":
            return sizes[source.self_attn]
        if path == "post_feedforward_layernorm":
            return sizes[source.mlp]
        if path == "pre_feedforward_layernorm":
            path = "post_attention_layernorm"
    return _weight(source, path)


def _weight(layer: Any, path: str) -> Tensor | None:
    """Return the weight of a layer's module; None where there is no such module."""
    modules: list[Any] = list(_there(layer, path))
    return next((_norm_weight(m) if path.endswith("norm") else m.weight for m in modules), None)


def _there(layer: Any, *paths: str) -> list[nn.Module]:
    """Return those of the modules that a layer has: families name and fuse them differently."""
    found = []
    for path in paths:
        with suppress(AttributeError):
            found.append(layer.get_submodule(path))
    return found


def _size(sizes: dict[nn.Module, float], layer: Any, path: str, scale: float = 1.0) -> float | None:
    """Return the size of a module's output, scaled; None where the layer has no such module."""
    return next((sizes[module] * scale for module in _there(layer, path)), None)


def _norm_weight(norm: Any) -> Tensor:
    """Return what a norm multiplies with, in whichever form it keeps that."""
    output: Tensor = norm(torch.ones_like(norm.weight))
    return output


def _set(parameter: Tensor, value: Tensor | float | None) -> None:
    if isinstance(value, float):
        parameter.fill_(value)
    elif value is not None and value.shape == parameter.shape:
        parameter.copy_(value)
