"""Products by the kernel, by AMX and by vectors: right, and the same bits for a row whatever is beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from specdec.runtime.kernels import products
from specdec.runtime.prepack import PrepackedLinear, head_multiplier, multiplier

pytestmark = pytest.mark.skipif(
    not products.has_products(), reason="this CPU has neither AMX nor AVX512-BF16, or there are no kernels"
)

SHAPES = [(32, 32), (1, 32), (33, 64), (960, 576), (100, 1536), (49, 2048)]


@pytest.fixture(params=["vectors", "matrices"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply in either way, where the machine can."""
    has_vectors = torch.cpu._is_avx512_bf16_supported()
    if not (has_vectors if request.param == "vectors" else products.has_matrices()):
        pytest.skip(f"this CPU does not multiply {request.param}")
    monkeypatch.setattr(products, "has_matrices", lambda: request.param == "matrices")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("num_rows", [*range(1, 18), 32, 33, 50, 600])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_product(outputs: int, inputs: int, num_rows: int, has_bias: bool) -> None:
    x, weight, bias = random(num_rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    found = products.multiplier(weight, bias if has_bias else None)(x)
    assert found.dtype is torch.bfloat16
    error = (found.double() - expected).abs()
    # Half a unit in the last of 8 places, and what fp32 rounds while it sums up.
    assert bool((error <= expected.abs() * 2**-8 + 1e-5 * inputs**0.5).all())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_row_gets_the_bits_it_gets_alone(outputs: int, inputs: int) -> None:
    multiply, x = (
        products.multiplier(random(outputs, inputs, seed=1), random(outputs, seed=2)),
        random(77, inputs),
    )
    together = multiply(x)
    for index in range(len(x)):
        assert torch.equal(multiply(x[index : index + 1])[0], together[index])
    assert torch.equal(multiply(x[30:70]), together[30:70])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_threads(num_threads: int) -> None:
    multiply, x, own = (
        products.multiplier(random(100, 64), None),
        random(40, 64, seed=1),
        torch.get_num_threads(),
    )
    expected = multiply(x)
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(multiply(x), expected)
    finally:
        torch.set_num_threads(own)


def test_inputs_that_lie_apart_and_more_dimensions() -> None:
    weight, x = random(40, 64), random(6, 4, 128, seed=1)
    multiply = products.multiplier(weight, None)
    assert torch.equal(multiply(x[:, 1:3, 64:]), multiply(x[:, 1:3, 64:].reshape(-1, 64)).view(6, 2, 40))
    assert multiply(x[:0, 0, :64]).shape == (0, 40)


def test_a_nan_stays_in_its_row() -> None:
    x = random(20, 64)
    x[7, 3] = float("nan")
    found = products.multiplier(random(40, 64, seed=1), None)(x)
    assert torch.isnan(found).any(1).nonzero().flatten().tolist() == [7]


def test_layers_are_multiplied_with_it() -> None:
    linear, x = nn.Linear(64, 40).bfloat16(), random(3, 64)
    expected = products.multiplier(linear.weight.detach(), linear.bias.detach())(x)
    assert torch.equal(multiplier(linear.weight.detach(), linear.bias.detach())(x), expected)
    assert torch.equal(PrepackedLinear(linear)(x), expected)
    assert torch.equal(head_multiplier(linear)(x), expected)


def test_other_weights_are_left_to_torch() -> None:
    assert products.can_multiply(random(40, 64))
    assert not products.can_multiply(random(40, 60)), "no whole tiles"
    assert not products.can_multiply(random(40, 64).float())


@pytest.mark.parametrize("x", [random(4, 96), random(4, 32), random(4, 64).float()])
def test_inputs_of_another_size_or_type_are_refused(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="does not fit a weight of 64 inputs"):
        products.multiplier(random(40, 64), None)(x)


def test_a_weight_that_it_cannot_multiply_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the kernel does not multiply with a weight \[40, 60\]"):
        products.multiplier(random(40, 60), None)


@pytest.mark.parametrize("num_rows", [1, 16, 40])
@pytest.mark.parametrize(("kind", "activation"), [(0, nn.SiLU()), (1, nn.GELU(approximate="tanh"))])
def test_gates_are_applied_to_sums(num_rows: int, kind: int, activation: nn.Module) -> None:
    x, gate, up = random(num_rows, 64), random(48, 64, seed=1) * 0.3, random(48, 64, seed=2)
    assert products.can_gate(gate)
    expected = activation(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    multiply = products.gated_multiplier(gate, up, kind)
    found = multiply(x)
    assert bool(((found.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4).all())
    assert torch.equal(multiply(x[:1])[0], found[0])


def test_gates_that_are_no_whole_tiles_are_left_to_others() -> None:
    assert not products.can_gate(random(40, 64))
