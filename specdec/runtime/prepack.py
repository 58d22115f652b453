"""Linear layers with packed weights, on a CPU in bf16: our own kernel's where it multiplies, else oneDNN's.

Our own needs AMX or AVX512-BF16, and a multiple of 32 inputs (`kernels.products`). oneDNN's layout is worth a
tenth to a fifth of a pass of a small model; the results have the same bits as without.

oneDNN rounds a row alike in products of up to some number of rows, and longer products are computed in parts.
Weights are reordered without a hint at that number: with a hint of one row, CPUs with AMX were seen to round
otherwise from 9 rows on (14,336 input features), 27 (6,144) or 65 (3,072), and took 1.2 to 1.5 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specdec.runtime.kernels.products import can_multiply
from specdec.runtime.kernels.products import multiplier as kernel_multiplier

_MAX_ROWS = 32 if torch.cpu._is_amx_tile_supported() else 128
"""Most rows of one product. Of more, oneDNN may take kernels that round otherwise (with AMX from 33 on, else
seen from about 130): the bits of a session would depend on how many others share its pass."""
_MAX_HEAD_ROWS = 32
"""The same of the LM head, whose weight may be in its own layout (seen from 33 on)."""


def in_parts(multiply: Callable[[Tensor], Tensor], x: Tensor, max_rows: int) -> Tensor:
    """[..., in_features] to [..., out_features], at most `max_rows` rows at a time and never one of many."""
    num_rows = x.shape[:-1].numel()
    if num_rows <= max_rows:
        return multiply(x)
    parts = x.reshape(num_rows, -1).tensor_split(-(-num_rows // max_rows))
    return torch.cat([multiply(part) for part in parts]).view(*x.shape[:-1], -1)


class StableHead(nn.Linear):
    """An LM head that rounds each row alike, however many there are. Takes over a layer's parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return in_parts(super().forward, x, _MAX_HEAD_ROWS)


class PrepackedLinear(nn.Module):
    """An nn.Linear for inference on a CPU. The weight is opaque: it can be multiplied with, nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # An attribute, not a parameter: the opaque layout cannot be moved, copied or saved.
        self._multiply = multiplier(
            linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        )
        self.weight = torch.empty_like(linear.weight, device="meta")
        """Shape and data type for model code that asks; there are no values in it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._multiply(x)


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x to x @ weight.T + bias, the weight reordered for it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        output: Tensor = multiply(x, packed, bias, "none", [], "")
        return output

    return apply


def prepack_linears(model: nn.Module, *, keep: nn.Module | None = None) -> None:
    """Replace the linear layers of a bf16 model on a CPU, but for `keep`; other models are left as they are.

    Args:
        model: evaluated only, from here on.
        keep: the LM head, whose weight is shared with the embedding and read by others.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Subclasses compute something of their own.
            if type(child) is nn.Linear and child is not keep and _can_prepack(child.weight):
                setattr(module, name, PrepackedLinear(child))


def stable_head(head: nn.Module) -> nn.Module:
    """The head to use: on a CPU in bf16 one that rounds the same in every pass, elsewhere `head` itself."""
    if type(head) is nn.Linear and _is_bf16_on_cpu(head.weight):
        return StableHead(head)
    return head


def multiplier(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x [..., in_features] to x @ weight.T + bias [..., out_features], prepacked where that can be done."""
    if can_multiply(weight):
        return kernel_multiplier(weight, bias)
    if not _can_prepack(weight):
        return partial(linear, weight=weight, bias=bias)
    multiply = _packed(weight, bias)

    def apply(x: Tensor) -> Tensor:
        # Not len(), which is Python code of torch's: a pass multiplies a hundred times.
        return multiply(x) if x.shape[0] <= _MAX_ROWS and x.ndim == 2 else in_parts(multiply, x, _MAX_ROWS)

    return apply


def head_multiplier(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """An LM head over [rows, hidden_size] that rounds rows alike on a CPU in bf16, prepacked where possible.

    A packed head has a weight of its own: the module's is shared with the embedding and read by others.
    """
    weight, bias = head.weight, head.bias
    if can_multiply(weight):
        return kernel_multiplier(weight.detach(), bias)
    if not _is_bf16_on_cpu(weight):
        return head.forward
    multiply = (
        _packed(weight.detach(), bias) if _can_prepack(weight) else lambda x: linear(x, head.weight, bias)
    )

    def apply(x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # a product with a single row rounds otherwise
            return multiply(x.expand(2, -1))[:1]
        return in_parts(multiply, x, _MAX_HEAD_ROWS)

    return apply


def _can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with it. On a CPU without AVX-512 it has no kernels for bf16."""
    return (
        _is_bf16_on_cpu(weight)
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16
