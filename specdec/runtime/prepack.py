"""Linear layers with weights in the layout oneDNN computes in, reordered once instead of at every call.

Worth a tenth to a fifth of a pass of a small model on a CPU in bf16; the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_MAX_ROWS = 128
"""Most rows of one product. Of more, oneDNN may take kernels that round otherwise (seen from about 130 on): a
session's bits would depend on how many others share its pass."""
_MAX_HEAD_ROWS = 32
"""The same of the LM head, whose weight is not reordered (seen from 33 on)."""


def in_parts(multiply: Callable[[Tensor], Tensor], x: Tensor, max_rows: int) -> Tensor:
    """Map [..., in_features] to [..., out_features], at most `max_rows` rows at a time, never one of many."""
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
        """Map [..., in_features] to [..., out_features]."""
        return in_parts(super().forward, x, _MAX_HEAD_ROWS)


class PrepackedLinear(nn.Module):
    """An nn.Linear for inference on a CPU. The weight is opaque: it can be multiplied with, nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Attributes, not parameters: the opaque layout cannot be moved, copied or saved.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.weight = torch.empty_like(linear.weight, device="meta")
        """Shape and data type for model code that asks; there are no values in it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return in_parts(self._multiply, x, _MAX_ROWS)

    def _multiply(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return output


def prepack_linears(model: nn.Module, *, keep: nn.Module) -> None:
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
    for parameter in model.parameters():
        if _is_bf16_on_cpu(parameter):
            # A view into the mapped checkpoint would keep all of it in memory.
            parameter.data = parameter.data.clone()


def stable_head(head: nn.Module) -> nn.Module:
    """Return the head to use: on a CPU in bf16 one that rounds alike in every pass, else `head` itself."""
    if type(head) is nn.Linear and _is_bf16_on_cpu(head.weight):
        return StableHead(head)
    return head


def multiplier(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a map of x [..., in_features] to x @ weight.T [..., out_features], prepacked where possible."""
    if not _can_prepack(weight):
        return partial(linear, weight=weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return PrepackedLinear(layer)


def _can_prepack(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies with it. On a CPU without AVX-512 it has no kernels for bf16."""
    return (
        _is_bf16_on_cpu(weight)
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16
