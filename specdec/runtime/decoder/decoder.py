"""A decoder: from the token ids of a pass to logits, in one loop over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.runtime.capture import AFTER_NORM
from specdec.runtime.decoder.families import (
    embedding_of,
    final_norm_of,
    layer_of,
    per_layer_embedding_of,
    rotaries_of,
    softcap_of,
)
from specdec.runtime.decoder.layers import (
    AttentionShape,
    Embedding,
    Layer,
    Norm,
    PerLayerEmbedding,
    Rotary,
    RotaryTable,
    softcapped,
)
from specdec.runtime.kernels import layer as kernels
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import write_rows
from specdec.runtime.model_pass import Pass
from specdec.runtime.prepack import head_multiplier

Capture = Callable[[int, Tensor], None]
"""Is given the index of a layer, or AFTER_NORM, and its output [tokens, hidden_size]."""


class PoolKv:
    """Keys and values of a pass in the pool."""

    def __init__(self, pool: KvPool, current: Pass) -> None:
        self._pool, self._current = pool, current

    def store(self, shape: AttentionShape, keys: Tensor, values: Tensor) -> None:
        """Keep K and V [tokens, num_kv_heads, head_dim], but for what pads the pass."""
        slots = self._current.slots_of(is_sliding=self._pool.is_sliding(shape.layer))
        num_stored = self._current.num_stored
        if num_stored < keys.shape[0]:
            keys, values = keys.narrow(0, 0, num_stored), values.narrow(0, 0, num_stored)
        key_pool, value_pool = self._pool.keys[shape.layer], self._pool.values[shape.layer]
        if kernels.takes(keys):
            kernels.store(keys, values, key_pool, value_pool, slots)
        else:
            write_rows(key_pool, slots, keys)
            write_rows(value_pool, slots, values)

    def attend(self, shape: AttentionShape, heads: Tensor) -> Tensor:
        """Attend as planned, from [tokens, heads, head_dim] to [tokens, num_heads * head_dim]."""
        keys, values = self._pool.by_head[shape.layer]
        plan = self._current.plan(shape.geometry)
        return plan.attend(
            heads.view(-1, shape.head_dim), keys, values, shape.scaling, shape.softcap
        ).flatten(1)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal LM of a dense family."""

    embedding: Embedding
    per_layer_embedding: PerLayerEmbedding | None
    rotaries: Mapping[str, Rotary]
    layers: Sequence[Layer]
    norm: Norm
    head: Callable[[Tensor], Tensor]
    softcap: float
    """Cap of the logits; 0: none."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Decoder:
        """Take the weights over from a model, layer by layer, which has no layers afterwards."""
        decoder: Any = model.get_decoder()
        rotaries = rotaries_of(decoder)
        per_layer_embedding, norm = per_layer_embedding_of(decoder), final_norm_of(decoder)
        layers = []
        for index, module in enumerate(decoder.layers):
            layers.append(layer_of(decoder, index))
            _free(module)
        del decoder.layers
        head: Any = model.get_output_embeddings()
        return cls(
            embedding_of(decoder.embed_tokens),
            per_layer_embedding,
            rotaries,
            layers,
            norm,
            head_multiplier(head),
            softcap_of(model.config),
        )

    def __call__(self, current: Pass, pool: KvPool, capture: Capture) -> Tensor:
        """Run a pass and return the logits of the rows that it wants [num_logits, vocab_size].

        Nothing in here waits for the device or makes a tensor of host data: a pass whose attention has been
        planned is a function of its buffers.
        """
        x = self.embedding(current.token_ids)
        own: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.per_layer_embedding is not None:
            own = self.per_layer_embedding(current.token_ids, x)
        tables = self.tables(current.positions, x.dtype)
        kv = PoolKv(pool, current)
        for index, layer in enumerate(self.layers):
            x = layer(x, tables, kv, own[index])
            capture(index, x)
        x = self.norm(x)
        capture(AFTER_NORM, x)
        return softcapped(self.head(x.index_select(0, current.logit_rows)), self.softcap)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> dict[str, RotaryTable]:
        """Return the rotary tables of a pass."""
        return {name: rotary.table(positions, dtype) for name, rotary in self.rotaries.items()}

    def prepare(self, current: Pass) -> None:
        """Plan attention for all layers before the pass runs."""
        for geometry in dict.fromkeys(layer.attention.shape.geometry for layer in self.layers):
            current.plan(geometry)


def _free(module: Any) -> None:
    """Let go of a module's weights: a copy was taken."""
    for part in module.modules():
        part._parameters.clear()
