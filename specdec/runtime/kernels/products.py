"""Products with a packed weight, by AMX or AVX512-BF16 (see `products.c`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.runtime.kernels.library import LIBRARY, are_for

_TILE = 16
"""Outputs of a tile, and pairs of inputs."""
_NO_GATE = -1


@cache
def has_matrices() -> bool:
    """Whether this CPU multiplies matrices (AMX), and the system lets this process do so."""
    return _has_vectors() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@cache
def has_products() -> bool:
    """Whether this CPU multiplies numbers in bf16: matrices, or vectors (AVX512-BF16)."""
    return has_matrices() or (_has_vectors() and torch.cpu._is_avx512_bf16_supported())


def _has_vectors() -> bool:
    return LIBRARY is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def can_multiply(weight: Tensor) -> bool:
    """Whether the kernel multiplies with a weight [outputs, inputs]."""
    return are_for(weight.dtype, weight.device) and has_products() and weight.shape[1] % (2 * _TILE) == 0


def multiplier(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [..., inputs] to x @ weight.T + bias [..., outputs], with a packed copy of the weight.

    A row gets the same bits however many rows there are.

    Raises:
        ValueError: the kernel does not multiply with this weight.
    """
    return _multiplier(weight, None if bias is None else bias.float(), _NO_GATE)


def gated_multiplier(gate: Tensor, up: Tensor, kind: int) -> Callable[[Tensor], Tensor]:
    """x [..., inputs] to activation(x @ gate.T) * (x @ up.T) [..., outputs], likewise.

    Args:
        kind: of the activation, see `layer.gate_kind`.

    Raises:
        ValueError: the kernel does not multiply with these weights.
    """
    # Sixteen gates, then the sixteen that they are for.
    pairs = torch.stack([gate.view(-1, _TILE, gate.shape[1]), up.view(-1, _TILE, up.shape[1])], 1)
    return _multiplier(pairs.flatten(0, 2), None, kind)


def can_gate(gate: Tensor) -> bool:
    """Whether the kernel multiplies with weights [outputs, inputs] of gates, and of what they are for."""
    return can_multiply(gate) and gate.shape[0] % _TILE == 0


def _multiplier(weight: Tensor, bias: Tensor | None, gate: int) -> Callable[[Tensor], Tensor]:
    if not can_multiply(weight):
        raise ValueError(f"the kernel does not multiply with a weight {[*weight.shape]} in {weight.dtype}")
    outputs, inputs = weight.shape
    num_results, packed = outputs if gate == _NO_GATE else outputs // 2, _packed(weight)

    def apply(x: Tensor) -> Tensor:
        if x.shape[-1] != inputs or x.dtype is not torch.bfloat16:
            raise RuntimeError(f"{[*x.shape]} in {x.dtype} does not fit a weight of {inputs} inputs in bf16")
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], num_results))
        LIBRARY.multiply(
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.numel() // inputs,
            inputs,
            outputs,
            gate,
            has_matrices(),
            torch.get_num_threads(),
        )
        return out

    return apply


def _packed(weight: Tensor) -> Tensor:
    """[outputs, inputs] to tiles, outputs filled up with zeros:
    [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2]."""
    outputs, inputs = weight.shape
    missing = -outputs % (2 * _TILE)
    weight = torch.cat([weight, weight.new_zeros(missing, inputs)]) if missing else weight
    tiles = weight.view(-1, 2, _TILE, inputs // (2 * _TILE), _TILE, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
