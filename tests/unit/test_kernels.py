"""Kernels for CPUs in bf16: what they compute, and that a row's bits depend on that row alone."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from drafter_service.drafters.dflash.markov import MarkovHead
from specdec.runtime.decoder.layers import Norm, add_norm, rotate
from specdec.runtime.kernels import layer as kernels
from specdec.runtime.kernels import library
from specdec.runtime.kernels import rows as row_kernels

pytestmark = pytest.mark.skipif(
    library.LIBRARY is None and not (shutil.which("gcc") or shutil.which("cc")),
    reason="without a C compiler there are no kernels",
)

SIZES = [1, 16, 31, 32, 33, 64, 100, 576]
EPSILON = 1e-5


def rows(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the norm in double precision."""
    wide = x.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
    return normed if weight is None else normed * weight.double()


def assert_rounded(found: Tensor, exact: Tensor, units: float = 0.51) -> None:
    """Assert that bf16 numbers are exact ones rounded: half a unit in the last of 8 places, and a little."""
    assert found.dtype is torch.bfloat16
    exact = exact.double()
    unit = 2.0 ** (exact.abs().clamp_min(2.0**-126).log2().floor() - 7)
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= units * unit).all())


def test_they_are_there() -> None:
    assert library.LIBRARY is not None
    assert kernels.takes(rows(1))
    assert not kernels.takes(torch.zeros(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_weight", [True, False])
def test_norm(size: int, has_weight: bool) -> None:
    x, weight = rows(7, size, scale=3.0), torch.rand(size) + 0.5 if has_weight else None
    assert_rounded(kernels.norm(x, weight, EPSILON), rms_norm(x, weight))


def test_norm_of_heads_that_lie_apart() -> None:
    heads = rows(5, 4, 64)
    assert_rounded(kernels.norm(heads[:, 1:3], None, EPSILON), rms_norm(heads[:, 1:3], None))


@pytest.mark.parametrize("size", SIZES)
def test_add_norm(size: int) -> None:
    x, added, weight = rows(7, size), rows(7, size, seed=1), torch.rand(size) + 0.5
    total, normed = kernels.add_norm(x, added, weight, EPSILON)
    assert torch.equal(total, x + added)
    assert torch.equal(normed, kernels.norm(total, weight, EPSILON))


@pytest.mark.parametrize("size", SIZES)
def test_add_norm_after_a_norm(size: int) -> None:
    x, added = rows(7, size), rows(7, size, seed=1)
    weight, after = torch.rand(size) + 0.5, torch.rand(size) + 0.5
    total, normed = kernels.add_norm(x, added, weight, EPSILON, after, EPSILON)
    assert torch.equal(total, x + kernels.norm(added, after, EPSILON))
    assert torch.equal(normed, kernels.norm(total, weight, EPSILON))


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("num_tables", [1, 5])
@pytest.mark.parametrize("has_norms", [True, False])
def test_turn(dim: int, num_tables: int, has_norms: bool) -> None:
    heads = rows(5, 9, dim)
    angles = torch.rand(num_tables, 1, dim // 2) * 100
    cosine = torch.cat([angles.cos()] * 2, -1).bfloat16()
    sine = torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5) if has_norms else (None, None)
    turned = kernels.turn(heads, (cosine, sine), 4, 2, *norms, EPSILON)
    before = heads[:, :6]
    if has_norms:
        parts = before.split([4, 2], 1)
        before = torch.cat(
            [kernels.norm(part, norm, EPSILON) for part, norm in zip(parts, norms, strict=True)], 1
        )
    expected = rotate(before.double(), (cosine.double(), sine.double()))
    size = before.double().abs().amax()
    assert float((turned.double() - expected).abs().max() / size) < 2**-8


@pytest.mark.parametrize(("kind", "activation"), [(0, nn.SiLU()), (1, nn.GELU(approximate="tanh"))])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_gated(kind: int, activation: nn.Module, scale: float) -> None:
    gate_up = torch.cat([rows(7, 100, scale=scale), rows(7, 100, seed=1)], 1)
    gate, up = gate_up.double().chunk(2, -1)
    found = kernels.gated(gate_up, kind)
    # Far below zero both are as good as nothing.
    expected = activation(gate) * up
    assert_rounded(found.where(expected.abs() > 1e-6, 0), expected.where(expected.abs() > 1e-6, 0), 0.6)
    assert torch.isfinite(found).all()
    assert float((found - expected).abs()[expected.abs() <= 1e-6].sum()) < 1e-5


@pytest.mark.parametrize("slots", [slice(3, 8), torch.tensor([9, 2, 11, 0, 5])])
def test_store(slots: slice | Tensor) -> None:
    heads = rows(5, 7, 16)
    keys, values = heads[:, 2:4], heads[:, 5:7]
    key_pool, value_pool = rows(12, 2, 16, seed=1), rows(12, 2, 16, seed=2)
    expected = key_pool.clone(), value_pool.clone()
    expected[0][slots], expected[1][slots] = keys, values
    kernels.store(keys, values, key_pool, value_pool, slots)
    assert torch.equal(key_pool, expected[0])
    assert torch.equal(value_pool, expected[1])


def of_rows(kernel: str) -> Callable[[Tensor], Tensor]:
    """Return a kernel as a function of its rows [rows, 128]."""
    weight = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    table = rows(1, 1, 32), rows(1, 1, 32, seed=1)
    return {
        "norm": lambda x: kernels.norm(x, weight, EPSILON),
        "add_norm": lambda x: kernels.add_norm(x, x, weight, EPSILON, weight, EPSILON)[1],
        "turn": lambda x: kernels.turn(x.view(-1, 4, 32), table, 3, 1, weight, None, EPSILON).flatten(1),
        "silu": lambda x: kernels.gated(x, 0),
        "gelu": lambda x: kernels.gated(x, 1),
    }[kernel]


@pytest.mark.parametrize("kernel", ["norm", "add_norm", "turn", "silu", "gelu"])
def test_a_row_gets_the_same_bits_whatever_is_beside_it(kernel: str) -> None:
    compute, x = of_rows(kernel), rows(33, 128, scale=2.0)
    together = compute(x)
    for index in range(len(x)):
        assert torch.equal(compute(x[index : index + 1].clone())[0], together[index])


@pytest.mark.parametrize("kernel", ["norm", "add_norm", "turn", "silu", "gelu"])
def test_a_nan_stays_in_its_row(kernel: str) -> None:
    x = rows(3, 128)
    x[1] = float("nan")
    found = of_rows(kernel)(x)
    assert torch.equal(torch.isnan(found).any(1), torch.tensor([False, True, False]))


def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_VERSION", ctypes.c_int32(-1).value)
    assert library.load() is None
    assert "install the package once more" in caplog.text


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 49152])
def test_arg_max_is_the_first_of_the_largest(size: int) -> None:
    x = rows(9, size)
    assert torch.equal(row_kernels.arg_max(x), x.float().argmax(-1))
    x[:] = -3.0
    assert row_kernels.arg_max(x).tolist() == [0] * 9
    x[2, size // 2 :] = 0.5
    x[3] = float("-inf")
    x[4, -1] = float("nan")
    x[5, size // 2] = float("inf")
    assert row_kernels.arg_max(x)[2:6].tolist() == [size // 2, 0, size - 1, size // 2]


def test_arg_max_of_rows_that_lie_apart() -> None:
    x = rows(9, 80)[::2, 7:70]
    assert torch.equal(row_kernels.arg_max(x), x.float().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_rows_are_read_before_one_is_written(dtype: torch.dtype) -> None:
    tensors = [torch.randn(20, *shape).to(dtype) for shape in ((3, 16), (5,), (2, 2, 2))]
    pairs = torch.tensor([[4, 5], [5, 4], [9, 1], [1, 2]])
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        tensor[pairs[:, 1]] = tensor[pairs[:, 0]]
    row_kernels.move(tensors, pairs[:, 0], pairs[:, 1])
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


def test_arg_max_is_of_rows() -> None:
    with pytest.raises(ValueError, match="unpack"):
        row_kernels.arg_max(rows(2, 3, 8))


def test_a_table_for_other_heads_is_refused() -> None:
    for table in (rows(1, 1, 16), rows(1, 1, 32).float()):
        with pytest.raises(ValueError, match="for heads of 32"):
            kernels.turn(rows(2, 3, 32), (table, table), 3, 0, None, None, EPSILON)


def test_a_markov_head_computes_the_same_with_kernels() -> None:
    head = MarkovHead(64, 32).bfloat16()
    nn.init.normal_(head.out.weight)
    states, embeddings = rows(5, 64), rows(5, 64, seed=1, scale=0.02)
    expected = head(states, embeddings).detach()
    with torch.inference_mode():
        found = head(states, embeddings)
    assert torch.allclose(found.float(), expected.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("after", [None, Norm(None, EPSILON)])
def test_norms_without_a_weight_are_norms(after: Norm | None) -> None:
    x, added = rows(4, 64, scale=3.0), rows(4, 64, seed=1, scale=3.0)
    total, normed = add_norm(x, added, after, Norm(None, EPSILON))
    assert torch.equal(total, x + (after(added) if after else added))
    assert_rounded(normed, rms_norm(total, None))
