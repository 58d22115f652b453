"""A decoder layer by layer, as the papers draw it: attention, MLP, and the norms around them.

Every tensor has one row per token of the pass. Families differ in their weights only (see `families`): a norm
that is not there is None, and so is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, rms_norm
from torch.nn.functional import embedding

from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels import layer as kernels

Linear = Callable[[Tensor], Tensor]
"""Maps [tokens, in_features] to [tokens, out_features]."""
RotaryTable = tuple[Tensor, Tensor]
"""Cosine and signed sine of each token's position [tokens, 1, head_dim]."""


@dataclass(frozen=True)
class Norm:
    """A root mean square norm over the last dimension, computed in fp32."""

    weight: Tensor | None
    """What the result is multiplied with; None: nothing."""
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised rows, in the type of `x`."""
        if kernels.takes(x):
            return kernels.norm(x, None if self.weight is None else self._wide_weight, self.epsilon)
        weight = self.weight
        if weight is None or weight.dtype is x.dtype:
            return rms_norm(x, x.shape[-1:], weight, self.epsilon)
        return rms_norm(x.to(weight.dtype), x.shape[-1:], weight, self.epsilon).to(x.dtype)

    def factors(self, size: int) -> Tensor:
        """Return what a row of that size is multiplied with, in fp32 [size]."""
        return torch.ones(size) if self.weight is None else self._wide_weight

    @cached_property
    def _wide_weight(self) -> Tensor:
        assert self.weight is not None
        return self.weight.float()


def add_norm(x: Tensor, added: Tensor, after: Norm | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return x + added, the latter after a norm of its own if it has one, and the norm of the sum."""
    if kernels.takes(x) and kernels.takes(added):
        size = x.shape[-1]
        return kernels.add_norm(
            x,
            added,
            norm.factors(size),
            norm.epsilon,
            after.factors(size) if after else None,
            after.epsilon if after else 0.0,
        )
    x = x + (after(added) if after else added)
    return x, norm(x)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding of the heads of one attention type."""

    inverse_frequencies: Tensor  # [head_dim / 2], fp32; zeros where dimensions are not turned
    scaling: float

    def table(self, positions: Tensor, dtype: torch.dtype) -> RotaryTable:
        """Return the table of a pass. The sine is negative in the first half, see `rotate`."""
        angles = positions[:, None].float() * self.inverse_frequencies
        cosine, sine = angles.cos() * self.scaling, angles.sin() * self.scaling
        return (
            torch.cat([cosine, cosine], -1).to(dtype)[:, None],
            torch.cat([-sine, sine], -1).to(dtype)[:, None],
        )


def rotate(heads: Tensor, table: RotaryTable) -> Tensor:
    """Turn heads [tokens, heads, head_dim] by their positions.

    Dimension i is paired with i + head_dim / 2. With the sine's first half negative, both halves take the
    same two operations.
    """
    cosine, sine = table
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), sine)


@dataclass(frozen=True)
class AttentionShape:
    """What attention is like in one layer."""

    layer: int
    """The layer whose keys and values it reads: its own, or an earlier one that shares them; -1: those of
    another model."""
    has_kv: bool
    """Whether it makes keys and values; a layer that shares another's has queries only."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: str
    """Which of the decoder's rotary embeddings turns its heads."""
    window: int
    """How many keys a query sees, its own included; 0: all before it."""
    scaling: float
    softcap: float = 0.0
    """Cap of the scores; 0: none."""
    value_is_key: bool = False
    """Whether V is made from what K is made from."""

    @cached_property
    def num_turned(self) -> int:
        """Heads that are turned: those of queries, and those of keys if there are any."""
        return self.num_heads + self.num_kv_heads * self.has_kv

    @cached_property
    def first_value(self) -> int:
        """Which of the projected heads is the first of the values."""
        return self.num_heads if self.value_is_key else self.num_turned

    @cached_property
    def geometry(self) -> Geometry:
        """What a pass plans attention by. Queries are taken from between keys that were turned with them."""
        return Geometry(self.num_heads, self.num_kv_heads, self.head_dim, self.window, self.num_turned)


class LayerKv(Protocol):
    """Keys and values that layers attend over: those of the pool, or a target's."""

    def store(self, shape: AttentionShape, keys: Tensor, values: Tensor) -> None:
        """Keep K and V [tokens, num_kv_heads, head_dim] of the pass."""

    def attend(self, shape: AttentionShape, heads: Tensor) -> Tensor:
        """Attend from the first `num_heads` of the heads [tokens, heads, head_dim].

        Returns:
            [tokens, num_heads * head_dim]
        """


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention with grouped heads: projections, norms of heads, rotation."""

    shape: AttentionShape
    project: Linear
    """To query heads, then key heads, then value heads, as far as the layer has them."""
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: Norm | None

    def __call__(self, x: Tensor, tables: Mapping[str, RotaryTable], kv: LayerKv) -> Tensor:
        """Map [tokens, hidden_size] to [tokens, hidden_size]."""
        shape = self.shape
        projected = self.project(x).view(x.shape[0], -1, shape.head_dim)
        turned = self._turned(projected, tables[shape.rotary])
        if shape.has_kv:
            values = projected.narrow(1, shape.first_value, shape.num_kv_heads)
            kv.store(
                shape,
                turned.narrow(1, shape.num_heads, shape.num_kv_heads),
                self.value_norm(values) if self.value_norm else values,
            )
        return self.output(kv.attend(shape, turned))

    def _turned(self, projected: Tensor, table: RotaryTable) -> Tensor:
        """Query and key heads [tokens, num_turned, head_dim] after their norms, turned."""
        shape = self.shape
        if kernels.takes(projected):
            return kernels.turn(
                projected,
                table,
                shape.num_heads,
                shape.num_turned - shape.num_heads,
                self.query_norm.factors(shape.head_dim) if self.query_norm else None,
                self.key_norm.factors(shape.head_dim) if self.key_norm else None,
                norm.epsilon if (norm := self.query_norm or self.key_norm) else 0.0,
            )
        return rotate(self._normed(projected.narrow(1, 0, shape.num_turned)), table)

    def _normed(self, heads: Tensor) -> Tensor:
        """Query and key heads after their norms."""
        if self.query_norm is None:
            return heads
        queries = self.query_norm(heads[:, : self.shape.num_heads])
        if self.key_norm is None:
            return queries
        return torch.cat([queries, self.key_norm(heads[:, self.shape.num_heads :])], 1)


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP: activation(gate(x)) * up(x), projected down."""

    gated: Linear
    """To activation(gate(x)) * up(x)."""
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden_size] to [tokens, hidden_size]."""
        return self.down(self.gated(x))


@dataclass(frozen=True, slots=True)
class PerLayerInput:
    """What a layer adds of the embedding that it has of its own (Gemma 4 E2B and E4B)."""

    gate: Linear
    activation: Callable[[Tensor], Tensor]
    projection: Linear
    norm: Norm

    def __call__(self, x: Tensor, own: Tensor) -> Tensor:
        """Return what is added to x [tokens, hidden_size]; `own`: [tokens, size of the layer's embedding]."""
        return self.norm(self.projection(self.activation(self.gate(x)) * own))


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer. Gemma has norms after attention and MLP as well."""

    attention_norm: Norm
    attention: Attention
    after_attention_norm: Norm | None
    mlp_norm: Norm
    mlp: Mlp
    after_mlp_norm: Norm | None
    per_layer_input: PerLayerInput | None = None
    scalar: Tensor | None = None
    """What the layer's output is multiplied with [1]."""

    def __call__(
        self,
        x: Tensor,
        tables: Mapping[str, RotaryTable],
        kv: LayerKv,
        own: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Map [tokens, hidden_size] to [tokens, hidden_size].

        Args:
            tables: rotary tables, of context and tokens.
            own: the layer's own embedding of the tokens, if it has one.
            context: more rows that keys and values are made of, before the tokens' [num_rows, hidden_size].
        """
        normed = self.attention_norm(x)
        attended = self.attention(normed if context is None else torch.cat([context, normed]), tables, kv)
        x, normed = add_norm(x, attended, self.after_attention_norm, self.mlp_norm)
        computed = self.mlp(normed)
        x = x + (self.after_mlp_norm(computed) if self.after_mlp_norm else computed)
        if self.per_layer_input is not None:
            assert own is not None
            x = x + self.per_layer_input(x, own)
        return x if self.scalar is None else x * self.scalar


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of a table, scaled. The table is looked up each time, for it may be moved to shared memory."""

    table: Callable[[], Tensor]
    """[vocab_size, size]"""
    scale: Tensor | None
    """A factor [] in the table's type; None: 1."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Map [tokens] to [tokens, size]."""
        rows = embedding(token_ids, self.table())
        return rows if self.scale is None else rows * self.scale


@dataclass(frozen=True, slots=True)
class PerLayerEmbedding:
    """The embeddings that the layers have of their own: by token, and projected from the common embedding."""

    by_token: Embedding
    projection: Linear
    projection_scale: float
    norm: Norm
    scale: float
    num_layers: int

    def __call__(self, token_ids: Tensor, embedded: Tensor) -> Sequence[Tensor]:
        """Return [tokens, size] for each layer."""
        projected = (self.projection(embedded) * self.projection_scale).unflatten(-1, (self.num_layers, -1))
        by_token = self.by_token(token_ids).unflatten(-1, (self.num_layers, -1))
        by_layer: Sequence[Tensor] = ((self.norm(projected) + by_token) * self.scale).unbind(1)
        return by_layer


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """Logits bent to stay within -cap to cap; 0: as they are."""
    return torch.tanh(logits / cap) * cap if cap else logits
