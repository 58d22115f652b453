"""Where a decoder's weights come from: the modules that transformers loaded, family by family.

A family is data. What a checkpoint's modules say themselves, such as biases, sizes, windows, norms of heads
or shared keys, is read from them; only what they do not say is in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.runtime.decoder.layers import (
    Attention,
    AttentionShape,
    Embedding,
    Layer,
    Linear,
    Mlp,
    Norm,
    PerLayerEmbedding,
    PerLayerInput,
    Rotary,
)
from specdec.runtime.kernels import layer as kernels
from specdec.runtime.kernels.products import can_gate, gated_multiplier
from specdec.runtime.kv_pool import KvShape
from specdec.runtime.prepack import multiplier

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_CHANGING_ROTARIES = {"dynamic", "longrope"}
"""Kinds of RoPE whose frequencies depend on how long the text is."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the modules of a family do not say."""

    norm_offset: float = 0.0
    """What is added to the weight of a norm."""
    has_norms_after: bool = False
    """Whether attention and MLP have a norm after them besides the one before."""
    has_softcap: bool = False
    """Whether attention scores are capped."""


FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family(),
    "Qwen2Model": Family(),
    "Qwen3Model": Family(),
    "Gemma2Model": Family(norm_offset=1.0, has_norms_after=True, has_softcap=True),
    "Gemma3TextModel": Family(norm_offset=1.0, has_norms_after=True),
    "Gemma4TextModel": Family(has_norms_after=True),
    "Gemma4UnifiedTextModel": Family(has_norms_after=True),
}
"""By the class of transformers' decoder."""
_BLOCK_DRAFTERS = {"MuseGlimmerAssistantModel": Family()}
"""The same of drafters that attend within a block, which is not causal."""


def why_not(model: PreTrainedModel) -> str:
    """Say why a model is not one of the dense families; empty: it is one. Nothing is changed."""
    decoder: Any = model.get_decoder()
    if type(decoder).__name__ not in FAMILIES:
        return f"{type(decoder).__name__} is not one of {', '.join(FAMILIES)}"
    if any(getattr(layer, "enable_moe_block", False) for layer in decoder.layers):
        return "its layers have experts"
    head = model.get_output_embeddings()
    for module in (*decoder.layers, *([head] if head is not None else ())):
        for name, part in module.named_modules():
            if "linear" in type(part).__name__.lower() and type(part) is not nn.Linear:
                return f"{name or 'its LM head'} is a {type(part).__name__}, which may be quantised"
    kinds = decoder.rotary_emb.rope_type
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    if changing := kinds & _CHANGING_ROTARIES:
        return f"its RoPE ({', '.join(sorted(changing))}) depends on the length of the text"
    strange = set(getattr(decoder.config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}"
    if not all(layer.self_attn.is_causal for layer in decoder.layers):
        return "its attention is not causal"
    return ""


def rotaries_of(decoder: Any) -> dict[str, Rotary]:
    """Return a decoder's rotary embeddings, by attention type where they differ, else under ""."""
    module = decoder.rotary_emb
    prefixes = [
        name.removesuffix("inv_freq") for name, _ in module.named_buffers() if name.endswith("inv_freq")
    ]
    return {
        prefix.removesuffix("_"): Rotary(
            getattr(module, f"{prefix}inv_freq").float(), float(getattr(module, f"{prefix}attention_scaling"))
        )
        for prefix in prefixes
        if not prefix.endswith("original_")
    }


def shape_of(decoder: Any, index: int) -> AttentionShape:
    """Return what attention is like in a layer."""
    attention = decoder.layers[index].self_attn
    source = _kv_source(decoder, index)
    num_heads = attention.q_proj.out_features // attention.head_dim
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window"):
        window = getattr(decoder.config, "sliding_window", None)  # Mistral says it once for all layers
    kind = getattr(attention, "layer_type", None)
    softcap = getattr(attention, "attn_logit_softcapping", None)
    return AttentionShape(
        layer=source,
        has_kv=source == index,
        num_heads=num_heads,
        num_kv_heads=num_heads // attention.num_key_value_groups,
        head_dim=attention.head_dim,
        rotary=kind if kind and hasattr(decoder.rotary_emb, f"{kind}_inv_freq") else "",
        window=window or 0,
        scaling=float(attention.scaling),
        softcap=float(softcap or 0.0) if _family(decoder).has_softcap else 0.0,
        value_is_key=source == index and attention.v_proj is None,
    )


def _kv_source(decoder: Any, index: int) -> int:
    """Return the layer whose keys and values a layer reads; -1: no layer of this model."""
    attention = decoder.layers[index].self_attn
    if not getattr(attention, "is_kv_shared_layer", False):
        return index
    sources = (
        at
        for at, layer in enumerate(decoder.layers)
        if layer.self_attn.store_full_length_kv and layer.self_attn.layer_type == attention.layer_type
    )
    return next(sources, -1)


def kv_shapes(decoder: Any) -> dict[int, KvShape]:
    """Return the geometry of every layer that stores keys and values."""
    shapes = [shape_of(decoder, index) for index in range(len(decoder.layers))]
    return {
        index: KvShape(shape.num_kv_heads, shape.head_dim, shape.head_dim, shape.window)
        for index, shape in enumerate(shapes)
        if shape.has_kv
    }


def layer_of(decoder: Any, index: int) -> Layer:
    """Return a layer with weights of its own: the modules that they come from may be freed."""
    module, norm = decoder.layers[index], _norm_maker(decoder)
    after = _family(decoder).has_norms_after
    scalar = getattr(module, "layer_scalar", None)
    return Layer(
        attention_norm=norm(module.input_layernorm),
        attention=_attention(module.self_attn, shape_of(decoder, index), norm),
        after_attention_norm=norm(module.post_attention_layernorm) if after else None,
        mlp_norm=norm(module.pre_feedforward_layernorm if after else module.post_attention_layernorm),
        mlp=Mlp(_gated(module.mlp), fused([module.mlp.down_proj])),
        after_mlp_norm=norm(module.post_feedforward_layernorm) if after else None,
        per_layer_input=_per_layer_input(module, norm),
        scalar=None if scalar is None or float(scalar) == 1.0 else scalar.clone(),
    )


def _attention(module: Any, shape: AttentionShape, norm: Callable[[Any], Norm]) -> Attention:
    parts = [module.q_proj]
    if shape.has_kv:
        parts += [module.k_proj] if shape.value_is_key else [module.k_proj, module.v_proj]
    norms = {name: getattr(module, name, None) for name in ("q_norm", "k_norm", "v_norm")}
    return Attention(
        shape,
        fused(parts),
        fused([module.o_proj]),
        *(norm(part) if part is not None else None for part in norms.values()),
    )


def _gated(module: Any) -> Linear:
    """Return the first half of an MLP, activation(gate(x)) * up(x): one product where a kernel does both."""
    gate, up, kind = module.gate_proj, module.up_proj, kernels.gate_kind(module.act_fn)
    if kind is not None and gate.bias is None and up.bias is None and can_gate(gate.weight):
        return gated_multiplier(gate.weight.detach(), up.weight.detach(), kind)
    multiply, activation = fused([gate, up]), module.act_fn.forward

    def apply(x: Tensor) -> Tensor:
        both = multiply(x)
        if kind is not None and kernels.takes(both):
            return kernels.gated(both, kind)
        gates, ups = both.chunk(2, -1)
        result: Tensor = activation(gates) * ups
        return result

    return apply


def _per_layer_input(module: Any, norm: Callable[[Any], Norm]) -> PerLayerInput | None:
    if not getattr(module, "hidden_size_per_layer_input", 0):
        return None
    return PerLayerInput(
        fused([module.per_layer_input_gate]),
        module.act_fn.forward,
        fused([module.per_layer_projection]),
        norm(module.post_per_layer_input_norm),
    )


def embedding_of(module: Any) -> Embedding:
    """Return a decoder's embedding, which goes on using the module's weight."""
    scale = getattr(module, "embed_scale", None)
    # Gemma rounds the scale to the weights' type first.
    return Embedding(lambda: module.weight, None if scale is None else scale.to(module.weight.dtype))


def per_layer_embedding_of(decoder: Any) -> PerLayerEmbedding | None:
    """Return the embeddings that layers have of their own; None: they have none."""
    if not getattr(decoder, "hidden_size_per_layer_input", 0):
        return None
    return PerLayerEmbedding(
        embedding_of(decoder.embed_tokens_per_layer),
        fused([decoder.per_layer_model_projection]),
        float(decoder.per_layer_model_projection_scale),
        _norm_maker(decoder)(decoder.per_layer_projection_norm),
        float(decoder.per_layer_input_scale),
        len(decoder.layers),
    )


def final_norm_of(decoder: Any) -> Norm:
    """Return the norm before the LM head."""
    return _norm_maker(decoder)(decoder.norm)


def softcap_of(config: Any) -> float:
    """Return the cap of a model's logits; 0: it has none."""
    return float(getattr(config.get_text_config(), "final_logit_softcapping", None) or 0.0)


def fused(parts: Sequence[nn.Linear]) -> Linear:
    """Return linear layers over one input as one, their outputs side by side, packed where possible."""
    weight = torch.cat([part.weight.detach() for part in parts])
    if all(part.bias is None for part in parts):
        return multiplier(weight)
    biases: list[Tensor] = [
        part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts
    ]
    return multiplier(weight, torch.cat(biases).detach())


def _family(decoder: Any) -> Family:
    return (FAMILIES | _BLOCK_DRAFTERS)[type(decoder).__name__]


def _norm_maker(decoder: Any) -> Callable[[Any], Norm]:
    offset = _family(decoder).norm_offset

    def make(module: Any) -> Norm:
        weight: Tensor | None = getattr(module, "weight", None)
        if weight is not None:
            # A weight near 1 keeps its digits in fp32 only, where the norm is computed in any case.
            weight = weight.detach().float() + offset if offset else weight.detach().clone()
        return Norm(weight, float(getattr(module, "variance_epsilon", None) or module.eps))

    return make
