from __future__ import annotations

import torch
from torch import nn

from specdec.runtime.prepack import PrepackedLinear, prepack_linears


class _Special(nn.Linear):
    """A subclass, which may compute something of its own."""


def make_model(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "inner": nn.Sequential(nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 96, bias=False)),
            "special": _Special(96, 96),
            "head": nn.Linear(96, 300, bias=False),
        }
    ).to(dtype)


@torch.inference_mode()
def test_the_same_bits() -> None:
    model, packed = make_model(torch.bfloat16), make_model(torch.bfloat16)
    prepack_linears(packed, keep=packed["head"])
    assert [type(packed["inner"][index]) for index in (0, 2)] == [PrepackedLinear] * 2
    for num_tokens in (1, 2, 9, 40):
        x = torch.randn(1, num_tokens, 96, dtype=torch.bfloat16)
        assert torch.equal(packed["inner"](x), model["inner"](x))
    assert packed["inner"][0].weight.shape == (64, 96)


def test_the_head_subclasses_and_other_types_are_left_alone() -> None:
    packed = make_model(torch.bfloat16)
    prepack_linears(packed, keep=packed["head"])
    assert type(packed["head"]) is nn.Linear
    assert type(packed["special"]) is _Special
    whole = make_model(torch.float32)
    prepack_linears(whole, keep=whole["head"])
    assert not any(isinstance(module, PrepackedLinear) for module in whole.modules())
