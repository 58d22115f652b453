"""What a layer computes between its matrix products, in one call each (see `layer.c`).

Where the kernels take a tensor they stand for operations of torch in `decoder.layers`, which say what is
computed. They round a result once, where torch rounds after every operation. They pass on no gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.runtime.kernels.library import LIBRARY

_SILU, _GELU_TANH = 0, 1
_GATES = {
    "SiLU": _SILU,
    "SiLUActivation": _SILU,
    "GELUTanh": _GELU_TANH,
    "NewGELUActivation": _GELU_TANH,
}
"""Activations that `gated` knows, by the class of their module."""


def takes(x: Tensor) -> bool:
    """Whether the kernels compute with a tensor of this type and device."""
    return LIBRARY is not None and x.dtype is torch.bfloat16 and x.is_cpu


def gate_kind(activation: Any) -> int | None:
    """Return what `gated` knows an activation module by; None: it does not know it."""
    return _GATES.get(type(activation).__name__)


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Return the root mean square norm of rows.

    Args:
        x: [..., size].
        weight: [size], fp32; None: rows are multiplied with nothing.
    """
    x = x.contiguous()
    normed, size = torch.empty_like(x), x.shape[-1]
    LIBRARY.norm(x.data_ptr(), _address(weight), normed.data_ptr(), x.numel() // size, size, epsilon)
    return normed


def add_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    epsilon: float,
    after: Tensor | None = None,
    after_epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return x + added, and the norm of that.

    Args:
        x, added: [tokens, size].
        weight: of the norm [size], fp32.
        after: weight of a norm of `added` before it is added [size], fp32; None: there is none.
    """
    x, added = x.contiguous(), added.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    num_rows, size = x.shape
    LIBRARY.add_norm(
        x.data_ptr(),
        added.data_ptr(),
        _address(after),
        weight.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        num_rows,
        size,
        after_epsilon,
        epsilon,
    )
    return total, normed


def turn(
    heads: Tensor,
    table: tuple[Tensor, Tensor],
    num_queries: int,
    num_keys: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Turn the first heads of each token by its position, after their norms.

    Args:
        heads: [tokens, heads, head_dim], contiguous: those of queries, then those of keys, then others.
        table: cosine and signed sine [tokens, 1, head_dim], or [1, 1, head_dim] for all tokens.
        query_norm, key_norm: weights of norms [head_dim], fp32; None: there is no norm.
        epsilon: of both norms.

    Returns:
        [tokens, num_queries + num_keys, head_dim]
    """
    num_rows, stride, dim = heads.shape
    turned = heads.new_empty((num_rows, num_queries + num_keys, dim))
    cosine, sine = table
    if not (takes(cosine) and cosine.shape[-1] == dim):
        raise ValueError(f"a rotary table {[*cosine.shape]} in {cosine.dtype} for heads of {dim}")
    LIBRARY.turn(
        heads.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        _address(query_norm),
        _address(key_norm),
        turned.data_ptr(),
        num_rows,
        stride,
        num_queries,
        num_keys,
        dim,
        dim if cosine.shape[0] > 1 else 0,
        epsilon,
    )
    return turned


def store(keys: Tensor, values: Tensor, key_pool: Tensor, value_pool: Tensor, slots: slice | Tensor) -> None:
    """Copy K and V of tokens to their slots.

    Args:
        keys, values: [tokens, num_kv_heads, head_dim]; a token's heads lie side by side.
        key_pool, value_pool: [slots, num_kv_heads, head_dim], contiguous.
    """
    first, at = (slots.start, None) if isinstance(slots, slice) else (0, slots.data_ptr())
    LIBRARY.store(
        keys.data_ptr(),
        values.data_ptr(),
        key_pool.data_ptr(),
        value_pool.data_ptr(),
        at,
        first,
        keys.shape[0],
        key_pool.stride(0),
        keys.stride(0),
        values.stride(0),
    )


def gated(gate_up: Tensor, kind: int) -> Tensor:
    """Return activation(gate) * up [tokens, size] of both side by side [tokens, 2 * size], contiguous."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    LIBRARY.gated(gate_up.data_ptr(), out.data_ptr(), num_rows, size, kind)
    return out


def _address(weight: Tensor | None) -> int | None:
    return None if weight is None else weight.data_ptr()
