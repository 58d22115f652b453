"""Any Hugging Face causal LM, run over the KV pool: the tokens of many sessions in one forward pass.

The model's own code is untouched. All sessions' new tokens are concatenated into a batch of one with their
own position ids; a cache object stores each layer's K and V in the pool and hands the layer on as a
reference; an attention function of ours, registered with transformers' AttentionInterface, resolves the
reference to each session's whole K and V. Layers that share another layer's KV pass the reference along.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, PreTrainedModel

from specdec.errors import InvalidArgumentError
from specdec.runtime.kv_pool import KvAllocation, KvPool, KvShape

ATTENTION_NAME = "specdec_paged"
_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FOLD_LIMIT = 64
"""Up to this many query tokens, query heads that share a KV head are folded into the token dimension."""
_NUM_PROBE_TOKENS = 8
_PROBE_TOLERANCE = {4: 1e-3, 2: 0.2}
"""Largest relative error of the probe's logits, by bytes per element."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a pass: `token_ids` at positions `start` onwards, over the KV before them."""

    allocation: KvAllocation
    start: int
    token_ids: Sequence[int]
    num_logits: int
    """Logits wanted: of the last `num_logits` tokens."""

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class _Pass:
    """What every layer of one pass shares."""

    segments: Sequence[Segment]
    slots: slice | Tensor
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)


class _LayerKv:
    """Stands for one layer's K (and V) of all sessions on the way from cache to attention."""

    def __init__(self, cache: _PoolCache, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def to(self, *_args: Any, **_kwargs: Any) -> _LayerKv:
        """Models move shared KV between devices; the pool stays where it is."""
        return self


class _PoolCache(Cache):
    """The cache a model sees during one pass."""

    def __init__(self, pool: KvPool, current: _Pass) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.current = current

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[_LayerKv, _LayerKv]:
        """Store [1, heads, tokens, dim] of all segments; the result goes to attention as it is."""
        keys, values = self.pool.keys[layer_idx], self.pool.values[layer_idx]
        slots = self.current.slots
        if isinstance(slots, slice):
            keys[slots] = key_states[0].transpose(0, 1)
            values[slots] = value_states[0].transpose(0, 1)
        else:
            keys.index_copy_(0, slots, key_states[0].transpose(0, 1))
            values.index_copy_(0, slots, value_states[0].transpose(0, 1))
        reference = _LayerKv(self, layer_idx)
        return reference, reference

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given to the model; nothing may be derived from the cache."""
        return 0


def _paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over its own KV; returns [1, num_tokens, num_heads, value_dim]."""
    cache, layer = key.cache, key.layer
    outputs, first = [], 0
    for index, segment in enumerate(cache.current.segments):
        num_tokens = len(segment.token_ids)
        begin = max(0, segment.start - sliding_window + 1) if sliding_window else 0
        slots = segment.allocation.slots(begin, segment.stop)
        mask = _mask(cache.current, index, sliding_window or 0, begin, query)
        output = _attend(
            query[0, :, first : first + num_tokens],
            cache.pool.keys[layer][slots].transpose(0, 1),
            cache.pool.values[layer][slots].transpose(0, 1),
            mask,
            scaling,
            softcap,
        )
        outputs.append(output.transpose(0, 1))
        first += num_tokens
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0), None


def _mask(current: _Pass, index: int, window: int, begin: int, query: Tensor) -> Tensor | None:
    """Additive causal mask [num_tokens, keys] of a segment; None for one token, which sees all its keys."""
    segment = current.segments[index]
    if len(segment.token_ids) == 1:
        return None
    found = current.masks.get((index, window))
    if found is None:
        positions = torch.arange(segment.start, segment.stop, device=query.device)[:, None]
        key_positions = torch.arange(begin, segment.stop, device=query.device)
        hidden = key_positions > positions
        if window:
            hidden |= key_positions <= positions - window
        found = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        found.masked_fill_(hidden, float("-inf"))
        current.masks[index, window] = found
    return found


def _attend(
    query: Tensor,  # [num_heads, num_tokens, head_dim]
    key: Tensor,  # [num_kv_heads, num_keys, head_dim]
    value: Tensor,  # [num_kv_heads, num_keys, value_dim]
    mask: Tensor | None,  # [num_tokens, num_keys]
    scaling: float | None,
    softcap: float | None,
) -> Tensor:  # [num_heads, num_tokens, value_dim]
    num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[0]
    groups = num_heads // num_kv_heads
    if num_tokens > _FOLD_LIMIT and not softcap:
        gqa = groups > 1
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=gqa
        )
        return out[0]
    # Heads of a group read the same K and V: as extra rows of one product nothing is repeated.
    folded = query.reshape(num_kv_heads, groups * num_tokens, head_dim)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    if softcap:
        out = _softcapped(folded, key, value, mask, scaling, softcap)
    else:
        out = scaled_dot_product_attention(
            folded[None], key[None], value[None], attn_mask=mask, scale=scaling
        )[0]
    return out.reshape(num_heads, num_tokens, -1)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2), which the fused kernels do not offer."""
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(-1).to(value.dtype) @ value


AttentionInterface.register(ATTENTION_NAME, _paged_attention)


class PackedModel:
    """A causal LM and the KV pool of its sessions."""

    def __init__(self, model: PreTrainedModel, *, kv_budget_bytes: int) -> None:
        """Switch `model` to attention over a pool of `kv_budget_bytes`.

        Raises:
            InvalidArgumentError: the model does not work this way, or the budget is less than one block.
        """
        self.model = model.eval()
        _refuse_unsupported(model)
        self.device: torch.device = model.device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        text_config = model.config.get_text_config()
        self.max_length: int = getattr(text_config, "max_position_embeddings", 0) or 0
        expected, shapes = _probe(model)
        model.set_attn_implementation(ATTENTION_NAME)
        self.pool = KvPool(shapes, budget_bytes=kv_budget_bytes, dtype=model.dtype, device=self.device)
        self._self_test(expected)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        """One pass over all segments.

        Returns:
            Per segment the logits [num_logits, vocab_size] of its last tokens, in the model's dtype.
        """
        return self._forward(_Pass(segments, self._write_slots(segments)))

    def _forward(self, current: _Pass) -> list[Tensor]:
        segments = current.segments
        token_ids = [token_id for segment in segments for token_id in segment.token_ids]
        positions = [p for segment in segments for p in range(segment.start, segment.stop)]
        output = self.model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            past_key_values=_PoolCache(self.pool, current),
            use_cache=True,
            logits_to_keep=_logit_rows(segments).to(self.device),
        )
        return list(output.logits[0].split([segment.num_logits for segment in segments]))

    @torch.inference_mode()
    def _self_test(self, expected: Tensor) -> None:
        """Compare with the model's own attention, in two chunks: a feature ours lacks would show here."""
        allocation = self.pool.allocate(_NUM_PROBE_TOKENS)
        probe, half = _probe_tokens(self.vocab_size), _NUM_PROBE_TOKENS // 2
        chunks = [
            Segment(allocation, 0, probe[:half], half),
            Segment(allocation, half, probe[half:], half),
        ]
        passes = [_Pass([chunk], self._write_slots([chunk])) for chunk in chunks]
        logits = torch.cat([self._forward(current)[0] for current in passes]).float()
        self.pool.free(allocation)
        error = ((logits - expected).norm() / expected.norm()).item()
        layer_types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        windowed = any(window for current in passes for _, window in current.masks)
        right = error <= _PROBE_TOLERANCE[self.model.dtype.itemsize]
        if not right or ("sliding_attention" in layer_types and not windowed):
            raise InvalidArgumentError(
                f"{type(self.model).__name__} gives other logits over the KV pool than with its own "
                f"attention (relative error {error:.3g}): it has a feature this service does not support.",
                reason="UNSUPPORTED_MODEL",
            )

    def _write_slots(self, segments: Sequence[Segment]) -> slice | Tensor:
        slots = [segment.allocation.slots(segment.start, segment.stop) for segment in segments]
        if len(slots) == 1:
            return slots[0]
        return torch.cat(
            [torch.arange(s.start, s.stop, device=self.device) if isinstance(s, slice) else s for s in slots]
        )


def _logit_rows(segments: Sequence[Segment]) -> Tensor:
    """Indices, in the packed batch, of the tokens whose logits are wanted."""
    rows: list[int] = []
    stop = 0
    for segment in segments:
        stop += len(segment.token_ids)
        rows.extend(range(stop - segment.num_logits, stop))
    return torch.tensor(rows, dtype=torch.long)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    strange = layer_types - _SUPPORTED_LAYER_TYPES
    if strange:
        raise InvalidArgumentError(
            f"{name} has layers of type {', '.join(sorted(strange))}; supported are "
            f"{', '.join(sorted(_SUPPORTED_LAYER_TYPES))}.",
            reason="UNSUPPORTED_MODEL",
        )
    if not model._supports_attention_backend:
        raise InvalidArgumentError(
            f"{name} does not take its attention from transformers' AttentionInterface, which the KV pool "
            "needs.",
            reason="UNSUPPORTED_MODEL",
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InvalidArgumentError(
            f"{name}.forward takes no logits_to_keep: it is no causal LM this service can run.",
            reason="UNSUPPORTED_MODEL",
        )


class _ShapeRecorder(Cache):
    """Notes the geometry of every layer that stores KV of its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, KvShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Record and pass through: a first chunk attends over itself."""
        self.shapes[layer_idx] = KvShape(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is cached."""
        return 0


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> tuple[Tensor, dict[int, KvShape]]:
    """Logits [tokens, vocab_size] of the probe by the model's own attention, and each layer's KV geometry.

    The geometry is observed because configurations name it in too many ways.
    """
    recorder = _ShapeRecorder()
    model.set_attn_implementation("eager")
    probe = _probe_tokens(model.get_output_embeddings().weight.shape[0])
    token_ids = torch.tensor([probe], device=model.device)
    positions = torch.arange(len(probe), device=model.device)[None]
    output = model(input_ids=token_ids, position_ids=positions, past_key_values=recorder, use_cache=True)
    return output.logits[0].float(), recorder.shapes


def _probe_tokens(vocab_size: int) -> list[int]:
    """Token ids spread over the vocabulary."""
    return [(17 + 7919 * index) % vocab_size for index in range(_NUM_PROBE_TOKENS)]
