"""Short convolutions around the sublayers of a DFlash 2 decoder, over the rows of each block.

A row is mixed with the few rows before it, channel by channel. The kernel is a constant part and one that is
made of the sublayer's input, the same for a group of neighbouring channels. One side is applied to that
input, the other to the sublayer's output. Rows of the context take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from specdec.runtime.decoder.layers import Attention, Layer, LayerKv, Linear, Mlp, RotaryTable
from specdec.runtime.prepack import multiplier


class BlockRows:
    """Where the rows of a pass stand in their blocks; set before each pass."""

    def __init__(self) -> None:
        self.places = torch.empty(0, dtype=torch.long)
        """Index of each row in its block [num_rows]."""

    def begin(self, lengths: Sequence[int], device: torch.device) -> None:
        """Take the lengths of a pass's blocks."""
        self.places = torch.cat([torch.arange(length, device=device) for length in lengths])


@dataclass(frozen=True, slots=True, eq=False)
class ShortConvolution:
    """The convolution around one sublayer."""

    base: Tensor  # [2 sides, taps, hidden_size]
    project: Linear
    """To the kernels' other part [rows, 2 * taps * groups]."""
    group_size: int
    rows: BlockRows

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], prefix: str, group_size: int, rows: BlockRows
    ) -> ShortConvolution:
        """Make it of a checkpoint's weights.

        Raises:
            KeyError, ValueError: weights are missing or do not fit each other.
        """
        base, projection = weights[f"{prefix}.base_kernel"], weights[f"{prefix}.kernel_projection.weight"]
        if base.ndim != 3 or len(base) != 2 or base.shape[2] % group_size:
            raise ValueError(f"{prefix}.base_kernel is {[*base.shape]} for groups of {group_size} channels")
        expected = [2 * base.shape[1] * (base.shape[2] // group_size), base.shape[2]]
        if [*projection.shape] != expected:
            raise ValueError(f"{prefix}.kernel_projection.weight is {[*projection.shape]}, not {expected}")
        return cls(base, multiplier(projection), group_size, rows)

    def __call__(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what the sublayer reads in place of x [rows, hidden_size], and what its output goes
        through."""
        _, taps, size = self.base.shape
        made = self.project(x).view(len(x), 2, taps, size // self.group_size)
        kernels = self.base + made.repeat_interleave(self.group_size, dim=-1)
        before, after = kernels.unbind(1)
        return self._convolved(x, before), lambda output: self._convolved(output, after)

    def _convolved(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Return the sum of each row and of those before it, times its kernel [rows, taps, hidden_size]."""
        total = kernels[:, 0] * x
        for back in range(1, kernels.shape[1]):
            before = torch.zeros_like(x)
            before[back:] = x[:-back]
            # Before a block there is nothing, though another block may lie there.
            before[self.rows.places < back] = 0
            total = total + kernels[:, back] * before
        return total


@dataclass(frozen=True, slots=True)
class ConvolvedAttention(Attention):
    """Attention with a convolution around it; rows of the context come first and are left as they are."""

    convolution: ShortConvolution

    def __call__(self, x: Tensor, tables: Mapping[str, RotaryTable], kv: LayerKv) -> Tensor:
        """Map [context and rows, hidden_size] to [rows, hidden_size]."""
        num_context = len(x) - len(self.convolution.rows.places)
        rows, finish = self.convolution(x[num_context:])
        return finish(Attention.__call__(self, torch.cat([x[:num_context], rows]), tables, kv))


@dataclass(frozen=True, slots=True)
class ConvolvedMlp(Mlp):
    """An MLP with a convolution around it."""

    convolution: ShortConvolution

    def __call__(self, x: Tensor) -> Tensor:
        """Map [rows, hidden_size] to [rows, hidden_size]."""
        rows, finish = self.convolution(x)
        return finish(Mlp.__call__(self, rows))


def convolved(around_attention: ShortConvolution, around_mlp: ShortConvolution, layer: Layer) -> Layer:
    """Return a layer with convolutions around its attention and its MLP."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    attention = {field.name: getattr(layer.attention, field.name) for field in fields(Attention)}
    mlp = {field.name: getattr(layer.mlp, field.name) for field in fields(Mlp)}
    values["attention"] = ConvolvedAttention(**attention, convolution=around_attention)
    values["mlp"] = ConvolvedMlp(**mlp, convolution=around_mlp)
    return Layer(**values)
