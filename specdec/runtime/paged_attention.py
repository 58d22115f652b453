"""Attention of a packed pass over the KV pool, in the shape transformers calls it.

A cache object stores each layer's K and V in the pool and hands the layer on as a reference; the attention
function, registered with transformers' AttentionInterface, resolves the reference to each session's own K
and V, and attends as the pass has planned. Layers that share another layer's KV pass the reference along.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import write_rows
from specdec.runtime.model_pass import Pass

ATTENTION_NAME = "specdec_paged"


class _LayerKv:
    """Stands for one layer's K (and V) of all sessions on the way from cache to attention."""

    def __init__(self, cache: PoolCache, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def to(self, *_args: Any, **_kwargs: Any) -> _LayerKv:
        """Models move shared KV between devices; the pool stays where it is."""
        return self


class PoolCache(Cache):
    """The cache a model sees during one pass."""

    def __init__(self, pool: KvPool, current: Pass) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.current = current

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[_LayerKv, _LayerKv]:
        """Store [1, heads, tokens, dim] of all segments; the result goes to attention as it is."""
        slots = self.current.slots_of(is_sliding=self.pool.is_sliding(layer_idx))
        for pool, states in (
            (self.pool.keys[layer_idx], key_states),
            (self.pool.values[layer_idx], value_states),
        ):
            # [tokens, heads, dim], without what pads the pass
            tokens = states[0].transpose(0, 1)[: self.current.num_stored]
            write_rows(pool, slots, tokens)
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
    keys, values = key.cache.pool.by_head[key.layer]
    _, num_heads, _, head_dim = query.shape
    assert not key.cache.pool.is_sliding(key.layer) or sliding_window, "a layer that gives back sees all"
    geometry = Geometry(num_heads, keys.shape[1], head_dim, sliding_window or 0, value_dim=values.shape[-1])
    plan = key.cache.current.plan(geometry)
    rows = query[0].transpose(0, 1).reshape(-1, head_dim)
    output = plan.attend(rows, keys, values, scaling, softcap or 0.0)
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
