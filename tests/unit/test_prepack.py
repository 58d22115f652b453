from __future__ import annotations

import pytest
import torch
from torch import nn

from specdec.runtime import prepack
from specdec.runtime.prepack import (
    PrepackedLinear,
    StableHead,
    in_parts,
    multiplier,
    prepack_linears,
    stable_head,
)

has_bf16_kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()


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


@pytest.mark.skipif(not has_bf16_kernels, reason="oneDNN has no bf16 kernels for this CPU")
@torch.inference_mode()
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Our own kernel, where there is one, need not round as torch does.
    monkeypatch.setattr(prepack, "can_multiply", lambda weight: False)
    model, packed = make_model(torch.bfloat16), make_model(torch.bfloat16)
    prepack_linears(packed, keep=packed["head"])
    assert [type(packed["inner"][index]) for index in (0, 2)] == [PrepackedLinear] * 2
    for num_tokens in (1, 2, 9, 40):
        x = torch.randn(1, num_tokens, 96, dtype=torch.bfloat16)
        assert torch.equal(packed["inner"](x), model["inner"](x))
    assert packed["inner"][0].weight.shape == (64, 96)


@pytest.mark.skipif(not has_bf16_kernels, reason="oneDNN has no bf16 kernels for this CPU")
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 960), (3072, 1024), (6144, 2048)])
@torch.inference_mode()
def test_a_row_gets_the_same_bits_in_every_product(in_features: int, out_features: int) -> None:
    """Kernels for few and for many input features differ in when they begin to round otherwise."""
    torch.manual_seed(1)
    multiply = multiplier(torch.randn(out_features, in_features, dtype=torch.bfloat16))
    x = torch.randn(160, in_features, dtype=torch.bfloat16)
    in_pairs = torch.cat([multiply(pair) for pair in x.split(2)])
    for num_rows in (3, 9, 16, 28, 32, 33, 50, 65, 128, 129, 160):
        assert torch.equal(multiply(x[:num_rows]), in_pairs[:num_rows]), num_rows


@torch.inference_mode()
def test_rows_are_multiplied_in_parts_that_round_alike() -> None:
    seen: list[int] = []

    def multiply(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x @ weight

    weight = torch.randn(8, 4)
    for num_rows in (1, 2, 32, 33, 64, 65, 200):
        seen.clear()
        x = torch.randn(1, num_rows, 8)
        assert torch.allclose(in_parts(multiply, x, 32), x @ weight, atol=1e-5)
        if num_rows > 32:
            assert sum(seen) == num_rows
            assert 2 <= min(seen) <= max(seen) <= 32


@torch.inference_mode()
def test_a_head_keeps_its_parameters() -> None:
    model = make_model(torch.bfloat16)
    head = model["head"]
    model["head"] = stable_head(head)
    assert type(model["head"]) is StableHead
    assert model["head"].weight is head.weight
    x = torch.randn(1, 40, 96, dtype=torch.bfloat16)
    assert torch.equal(model["head"](x), torch.cat([head(x[:, :20]), head(x[:, 20:])], dim=1))
    whole = make_model(torch.float32)
    whole["head"] = stable_head(whole["head"])
    assert type(whole["head"]) is nn.Linear


@torch.inference_mode()
def test_a_cpu_without_bf16_kernels_runs_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, same = make_model(torch.bfloat16), make_model(torch.bfloat16)
    prepack_linears(same, keep=same["head"])
    assert not any(isinstance(module, PrepackedLinear) for module in same.modules())
    x = torch.randn(1, 9, 96, dtype=torch.bfloat16)
    assert torch.equal(same["inner"](x), model["inner"](x))
    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    assert torch.equal(multiplier(weight)(x), torch.nn.functional.linear(x, weight))


def test_the_head_subclasses_and_other_types_are_left_alone() -> None:
    packed = make_model(torch.bfloat16)
    prepack_linears(packed, keep=packed["head"])
    assert type(packed["head"]) is nn.Linear
    assert type(packed["special"]) is _Special
    whole = make_model(torch.float32)
    prepack_linears(whole, keep=whole["head"])
    assert not any(isinstance(module, PrepackedLinear) for module in whole.modules())
