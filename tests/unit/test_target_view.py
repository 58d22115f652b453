"""What a drafter is shown of target state, and the projection of it."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from torch import Tensor, nn

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import ProjectionInfo, TargetStateSpec, TensorRef, key_name, value_name
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.state.view import Projection, TargetStateView, num_projection_bytes
from tests.state_probe import random_projection

CPU = torch.device("cpu")
FEATURES = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_projection_is_a_linear_layer_and_an_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    projection = random_projection(2, 32, 48, dtype)
    layer = nn.Sequential(nn.Linear(64, 48, bias=False), nn.RMSNorm(48, eps=1e-6)).to(torch.float64)
    with torch.no_grad():
        layer[0].weight.copy_(projection.fc)
        layer[1].weight.copy_(projection.norm)
        wanted = layer(FEATURES.to(dtype).double())
    actual = projection(FEATURES)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_projection_survives_the_wire(dtype: torch.dtype) -> None:
    projection = random_projection(2, 32, 48, dtype)
    data = projection.to_bytes()
    assert len(data) == num_projection_bytes(projection.info) == dtype.itemsize * 48 * 65
    info = ProjectionInfo.from_proto(projection.info.to_proto())
    assert info == projection.info
    again = Projection.from_bytes(info, bytearray(data))
    assert torch.equal(again.fc, projection.fc)
    assert torch.equal(again.norm, projection.norm)
    assert torch.equal(again(FEATURES), projection(FEATURES))


def test_the_checksum_is_what_the_contract_says() -> None:
    fc = torch.arange(6.0).view(2, 3)
    norm = torch.tensor([1.0, 2.0])
    data = struct.pack("<8f", *range(6), 1, 2) + struct.pack("<d", 1e-5)
    assert Projection(fc, norm, 1e-5).info.sha256 == hashlib.sha256(data).hexdigest()
    transposed = fc.T.contiguous().T  # the same values, laid out otherwise
    assert Projection(transposed, norm, 1e-5).info == Projection(fc, norm, 1e-5).info
    assert Projection(fc, norm, 1e-6).info.sha256 != Projection(fc, norm, 1e-5).info.sha256


def test_wrong_projections_are_refused() -> None:
    fc, norm = torch.zeros(4, 8), torch.zeros(4)
    for wrong_fc, wrong_norm in ((fc[0], norm), (fc, norm[:3]), (fc, norm.half()), (fc, norm[None])):
        with pytest.raises(InvalidArgumentError, match="of one type"):
            Projection(wrong_fc, wrong_norm, 1e-6)
    info = Projection(fc, norm, 1e-6).info
    with pytest.raises(InvalidArgumentError, match="are not a projection"):
        Projection.from_bytes(info, bytearray(143))
    with pytest.raises(InvalidArgumentError, match="checksum"):
        Projection.from_bytes(info, bytearray(b"\1" + bytes(143)))


def a_view(blocks: tuple[int, ...], length: int, *, projection: Projection | None = None) -> TargetStateView:
    """Return a view of a pool whose rows hold their slot's number."""
    slots = torch.arange(4.0 * BLOCK_TOKENS)[:, None]
    tensors: dict[str, Tensor] = {"hidden.2": slots.repeat(1, 3), "hidden.0": -slots.repeat(1, 3)}
    tensors["last_hidden"] = slots + 0.5
    refs = []
    for layer, kind in ((0, "sliding_attention"), (1, "full_attention"), (3, "sliding_attention")):
        for name in (key_name(layer), value_name(layer)):
            tensors[name] = slots[:, None].repeat(1, 2, 1) + layer
            refs.append(TensorRef(name, "float32", tuple(tensors[name].shape), attention_type=kind))
    spec = TargetStateSpec((2, 0), True, (0, 1, 3), projection=projection.info if projection else None)
    return TargetStateView(spec, tensors, refs, KvAllocation.of(blocks, CPU), length, projection)


@pytest.mark.parametrize("blocks", [(1, 2), (3, 1), (2, 0)])
def test_rows_are_in_position_order(blocks: tuple[int, ...]) -> None:
    view = a_view(blocks, BLOCK_TOKENS + 5)
    slots = [BLOCK_TOKENS * block + offset for block in blocks for offset in range(BLOCK_TOKENS)]
    expected = torch.tensor(slots[: view.length], dtype=torch.float32)
    assert torch.equal(view.hidden(2)[:, 0], expected)
    assert torch.equal(view.hidden(2, 3, BLOCK_TOKENS + 2)[:, 0], expected[3 : BLOCK_TOKENS + 2])
    assert torch.equal(view.last_hidden(view.length - 1)[:, 0], expected[-1:] + 0.5)
    keys, values = view.kv(1)
    assert keys.shape == values.shape == (view.length, 2, 1)
    assert torch.equal(keys[:, 0, 0], expected + 1)
    # In the spec's order, not the layers'.
    assert torch.equal(view.features()[:, 0], expected)
    assert torch.equal(view.features(1, 2), torch.cat([view.hidden(2, 1, 2), view.hidden(0, 1, 2)], -1))


def test_a_run_is_read_in_place() -> None:
    assert a_view((1, 2), 80).hidden(2)._is_view()
    assert len(a_view((1, 2), 80).hidden(2, 80)) == 0


def test_positions_that_may_change_cannot_be_read() -> None:
    view = a_view((1, 2), 80)
    for start, stop in ((0, 81), (-1, 3), (5, 4), (81, None)):
        with pytest.raises(AssertionError, match="below the cached length"):
            view.hidden(2, start, stop)


def test_the_last_layer_of_each_attention_type() -> None:
    view = a_view((0,), 8)
    assert set(view.attention_types) == {"sliding_attention", "full_attention"}
    assert view.last_layer_of("sliding_attention") == 3
    assert view.last_layer_of("full_attention") == 1
    with pytest.raises(KeyError):
        view.last_layer_of("linear_attention")


def test_projected_here_or_elsewhere() -> None:
    projection = random_projection(2, 3, 4, torch.float32)
    view = a_view((1, 3), 70, projection=projection)
    assert torch.equal(view.projected(), projection(view.features()))
    assert torch.equal(view.projected(60, 70), projection(view.features(60, 70)))
    ready = torch.randn(4 * BLOCK_TOKENS, 4)
    allocation = KvAllocation.of((0, 1), CPU)
    mirrored = TargetStateView(view.spec, {"projected": ready}, (), allocation, 70, projection)
    assert torch.equal(mirrored.projected(5), ready[5:70])
