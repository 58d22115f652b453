"""EAGLE-3's decoder: the first layer reads a token's embedding and a feature side by side; more may follow.

Attention is over the keys and values that the drafter has made of the pairs before, and of the steps that led
to a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaModel, PretrainedConfig, Qwen3Model

from specdec.runtime.attention_plan import Geometry
from specdec.runtime.decoder.families import final_norm_of, layer_of, rotaries_of
from specdec.runtime.decoder.layers import AttentionShape, Norm, add_norm
from specdec.runtime.kernels import layer as kernels
from specdec.runtime.kernels.attention import BLOCK, RowKeys, RowPlan, SessionRows, attends
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import KvAllocation, write_rows

_DECODERS = {"llama": LlamaModel, "qwen3": Qwen3Model}


def empty_decoder(config: PretrainedConfig) -> nn.Module:
    """Return a decoder whose weights are to be loaded; its first layer's projections are twice as wide."""
    decoder: Any = _DECODERS[config.model_type](config)
    size = config.hidden_size
    attention = decoder.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(2 * size, getattr(attention, name).out_features, bias=False))
    decoder.layers[0].hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
    decoder.embed_tokens = nn.Identity()
    module: nn.Module = decoder
    return module


class EagleForward:
    """A step over any number of rows; it takes the decoder's layers over.

    Args:
        norm_before_residual: whether the first layer adds to the normed features.
    """

    def __init__(self, model: nn.Module, *, norm_before_residual: bool) -> None:
        decoder: Any = model
        self._rotaries = rotaries_of(decoder)
        first = decoder.layers[0].hidden_norm
        self._feature_norm = Norm(first.weight.detach(), first.eps)
        self._layers = [layer_of(decoder, index) for index in range(len(decoder.layers))]
        self._norm_before_residual = norm_before_residual
        self.norm = final_norm_of(decoder)
        del decoder.layers

    def __call__(self, embeddings: Tensor, features: Tensor, positions: Tensor, kv: PairKv) -> Tensor:
        """Return the rows' outputs before the final norm [num_rows, hidden_size].

        Args:
            embeddings: of each row's token [num_rows, hidden_size].
            features: of the position before it [num_rows, hidden_size].
            positions: of the rotary embedding [num_rows].
        """
        tables = {name: rotary.table(positions, features.dtype) for name, rotary in self._rotaries.items()}
        first, normed = self._layers[0], self._feature_norm(features)
        read = torch.cat([first.attention_norm(embeddings), normed], dim=-1)
        residual = normed if self._norm_before_residual else features
        x, normed = add_norm(residual, first.attention(read, tables, kv), None, first.mlp_norm)
        x = x + first.mlp(normed)
        for layer in self._layers[1:]:
            x = layer(x, tables, kv)
        return x


class PairKv:
    """Keys and values of the sessions of a step, in the drafter's pool.

    Args:
        allocations: the memory of each session.
        rows: which keys each session's rows attend to.
        slots: where the rows' own keys and values go.
    """

    def __init__(
        self,
        pool: KvPool,
        allocations: Sequence[KvAllocation],
        rows: Sequence[SessionRows],
        slots: slice | Tensor,
    ) -> None:
        self._pool, self._allocations, self._rows, self._slots = pool, allocations, rows, slots
        self._num_rows = sum(len(session.rows) for session in rows)
        self._plans: dict[Geometry, RowPlan] = {}

    def store(self, shape: AttentionShape, keys: Tensor, values: Tensor) -> None:
        """Keep K and V [rows, num_kv_heads, head_dim]."""
        key_pool, value_pool = self._pool.keys[shape.layer], self._pool.values[shape.layer]
        if kernels.takes(keys):
            kernels.store(keys, values, key_pool, value_pool, self._slots)
        else:
            write_rows(key_pool, self._slots, keys)
            write_rows(value_pool, self._slots, values)

    def attend(self, shape: AttentionShape, heads: Tensor) -> Tensor:
        """Attend from the first `num_heads` of the heads; return [rows, num_heads * head_dim]."""
        keys, values = self._pool.keys[shape.layer], self._pool.values[shape.layer]
        geometry = shape.geometry
        if attends(keys.dtype, keys.device, shape.head_dim):
            if geometry not in self._plans:
                self._plans[geometry] = RowPlan(self._rows, geometry, self._num_rows)
            plan = self._plans[geometry]
            return plan.attend(heads.view(-1, shape.head_dim), keys, values, shape.scaling, 0.0).flatten(1)
        queries = heads[:, : shape.num_heads]
        counts = [len(session.rows) for session in self._rows]
        outputs = [
            _attend_alone(own, keys, values, allocation, session, shape.scaling)
            for own, allocation, session in zip(
                queries.split(counts), self._allocations, self._rows, strict=True
            )
        ]
        return torch.cat(outputs)


def _attend_alone(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    allocation: KvAllocation,
    session: SessionRows,
    scaling: float,
) -> Tensor:
    """Attend from one session's rows [rows, heads, dim]; return [rows, heads * dim]."""
    stop = 1 + max((*session.places, *(row.stop - 1 for row in session.rows)))
    seen = torch.zeros(len(session.rows), stop, dtype=torch.bool)
    for index, row in enumerate(session.rows):
        seen[index, : row.stop] = True
        seen[index, list(session.places[row.tail : row.tail + row.num_tail])] = True
    slots = allocation.slots(0, stop)
    attended = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[slots].transpose(0, 1)[None],
        values[slots].transpose(0, 1)[None],
        attn_mask=seen.to(queries.device),
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def rows_of_pairs(allocation: KvAllocation, start: int, stop: int, first_row: int) -> SessionRows:
    """Return the rows of pairs: each attends to all pairs up to its own."""
    rows = [RowKeys(first_row + index, 0, place + 1) for index, place in enumerate(range(start, stop))]
    return SessionRows(allocation.blocks, rows, stop)


def rows_of_steps(
    allocation: KvAllocation, num_pairs: int, paths: Sequence[Sequence[int]], first_row: int
) -> SessionRows:
    """Return the rows of steps: each attends to all pairs, and to the steps on its path.

    Args:
        paths: for each row the places of its steps, its own at the end.
    """
    shared = num_pairs // BLOCK * BLOCK
    rows, places = list[RowKeys](), list[int]()
    for index, path in enumerate(paths):
        tail = [*range(shared, num_pairs), *path]
        rows.append(RowKeys(first_row + index, 0, shared, len(places), len(tail)))
        places.extend(tail)
    return SessionRows(allocation.blocks, rows, shared, places)
