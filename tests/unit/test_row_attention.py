"""Attention by the kernel for CPUs: what it computes, and that a row's bits depend on its own keys alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from specdec.runtime.attention import Segment, with_rows
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels import attention
from specdec.runtime.kernels.attention import RowPlan, SessionRows
from specdec.runtime.kernels.library import LIBRARY
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.runtime.model_pass import Pass

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built")

NUM_BLOCKS = 20


@pytest.fixture(params=["vectors", "matrices"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply in either way, where the machine can."""
    if request.param == "matrices" and not attention.has_matrices():
        pytest.skip("this CPU does not multiply matrices")
    monkeypatch.setattr(attention, "has_matrices", lambda: request.param == "matrices")
    product: str = request.param
    return product


@dataclass(frozen=True)
class Heads:
    """Queries of a pass, and keys and values of a pool."""

    geometry: Geometry
    queries: Tensor  # [tokens, stride, dim]
    keys: Tensor  # [slots, num_kv_heads, dim]
    values: Tensor

    @classmethod
    def random(cls, geometry: Geometry, num_tokens: int, seed: int = 0) -> Heads:
        generator = torch.Generator().manual_seed(seed)

        def tensor(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, geometry.head_dim, generator=generator).bfloat16()

        slots = NUM_BLOCKS * BLOCK_TOKENS
        return cls(
            geometry,
            tensor(num_tokens, geometry.stride or geometry.num_heads),
            tensor(slots, geometry.num_kv_heads),
            tensor(slots, geometry.num_kv_heads),
        )

    def attend(self, *segments: Segment, scaling: float = 0.2, softcap: float = 0.0, pad: int = 0) -> Tensor:
        """Return [tokens, num_heads, dim] of the kernel."""
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        sessions = [
            SessionRows.of(segment, row, self.geometry.window) for row, segment in with_rows(segments)
        ]
        plan = RowPlan(sessions, self.geometry, num_tokens + pad)
        packed = self.queries.flatten(0, 1)
        keys, values = (part.transpose(0, 1)[None] for part in (self.keys, self.values))
        return plan.attend(packed, keys, values, scaling, softcap)

    def of_row(self, row: int, slots: Tensor, *, scaling: float = 0.2, softcap: float = 0.0) -> Tensor:
        """Return [num_heads, dim] of a row that attends to slots, in double precision."""
        geometry = self.geometry
        queries = self.queries[row, : geometry.num_heads].double()
        keys, values = (
            part[slots].double().repeat_interleave(geometry.fold, 1) for part in (self.keys, self.values)
        )
        scores = torch.einsum("hd,khd->hk", queries, keys) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        return torch.einsum("hk,khd->hd", scores.softmax(-1), values)

    def rows(self, *rows: int) -> Heads:
        """Return the same with some of the queries."""
        return Heads(self.geometry, self.queries[list(rows)].contiguous(), self.keys, self.values)


def allocation(*blocks: int) -> KvAllocation:
    return KvAllocation.of(blocks, torch.device("cpu"))


def chain(where: KvAllocation, start: int, num_tokens: int) -> Segment:
    return Segment(where, start, [0] * num_tokens, num_tokens)


def tree(where: KvAllocation, start: int, parents: list[int]) -> Segment:
    return Segment(where, start, [0] * len(parents), len(parents), parents)


def slots_of(segment: Segment, index: int, window: int) -> Tensor:
    """Return the slots that a token attends to, in order of their positions."""
    path = [index]
    while segment.parents and segment.parents[path[0]] >= 0:
        path.insert(0, segment.parents[path[0]])
    own = path if segment.parents else range(index + 1)
    places = torch.tensor([*range(segment.start), *(segment.start + token for token in own)])
    return segment.allocation.slots_at(places[-window:] if window else places)


def random_parents(random: Random, num_tokens: int) -> list[int]:
    return [-1, *(random.choice([index - 1, random.randrange(index)]) for index in range(1, num_tokens))]


def segments_of_a_pass() -> Iterator[Segment]:
    random = Random(3)
    yield chain(allocation(2, 3, 4, 5, 6), 260, 21)
    yield chain(allocation(9), 0, 40)
    yield tree(allocation(19, 1, 12, 7, 0, 18), 301, random_parents(random, 40))
    yield chain(allocation(10), 7, 1)
    yield tree(allocation(13, 14), 32, random_parents(random, 5))
    yield tree(allocation(15), 0, [-1, 0, 0])


GEOMETRIES = [
    Geometry(9, 3, 64),
    Geometry(9, 3, 64, stride=12),
    Geometry(8, 1, 256, 64),
    Geometry(2, 2, 16),
    Geometry(4, 2, 48, 33),
    Geometry(20, 1, 32, 200),
    Geometry(32, 1, 24),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_it_is_attention(geometry: Geometry, softcap: float) -> None:
    segments = list(segments_of_a_pass())
    heads = Heads.random(geometry, sum(len(segment.token_ids) for segment in segments))
    found = heads.attend(*segments, softcap=softcap)
    row = 0
    for segment in segments:
        for index in range(len(segment.token_ids)):
            expected = heads.of_row(row, slots_of(segment, index, geometry.window), softcap=softcap)
            error = (found[row].double() - expected).abs().max() / expected.abs().max()
            # The result and the weights are rounded to 8 places.
            assert float(error) < 2**-7, (segment.start, index)
            row += 1
    assert row == len(found)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_row_gets_the_bits_it_gets_alone(geometry: Geometry) -> None:
    where, start = allocation(2, 3, 4, 5, 6, 7, 8, 9, 10), 490
    heads = Heads.random(geometry, 48)
    together = heads.attend(chain(where, start, 48))
    for index in range(48):
        alone = heads.rows(index).attend(chain(where, start + index, 1))
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 31, 32, 100, 511, 512, 600])
def test_a_branch_gets_the_bits_of_a_chain(geometry: Geometry, start: int) -> None:
    where, parents = allocation(*range(8, 19)), random_parents(Random(start), 45)
    heads = Heads.random(geometry, 45)
    of_tree = tree(where, start, parents)
    together = heads.attend(of_tree)
    for index in range(45):
        # The same keys as a chain's, which is elsewhere.
        slots, path = slots_of(of_tree, index, 0), allocation(*range(8))
        keys, values = heads.keys.clone(), heads.values.clone()
        keys[: len(slots)], values[: len(slots)] = keys[slots], values[slots]
        moved = Heads(geometry, heads.queries[index : index + 1].contiguous(), keys, values)
        if len(slots) <= path.capacity:
            alone = moved.attend(chain(path, len(slots) - 1, 1))
            assert torch.equal(alone[0], together[index]), index


def test_bits_do_not_depend_on_where_blocks_are() -> None:
    heads = Heads.random(Geometry(9, 3, 64), 20)
    run, scattered = allocation(*range(5)), allocation(17, 6, 12, 9, 19)
    expected = heads.attend(chain(run, 270, 20))
    for tensor in (heads.keys, heads.values):
        tensor[scattered.slots(0, 320)] = tensor[run.slots(0, 320)].clone()
    assert torch.equal(heads.attend(chain(scattered, 270, 20)), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(num_threads: int) -> None:
    heads, segments = Heads.random(Geometry(9, 3, 64), 200), list(segments_of_a_pass())
    expected, own = heads.attend(*segments), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(heads.attend(*segments), expected)
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("geometry", [Geometry(9, 3, 64), Geometry(9, 3, 64, 20)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_and_values_that_a_row_does_not_see_do_not_reach_it(geometry: Geometry, value: float) -> None:
    where = allocation(4, 5)
    heads = Heads.random(geometry, 12)
    segments = [chain(where, 60, 6), tree(where, 60, [-1, 0, 0, 1, 1, 0])]
    expected = heads.attend(*segments)
    for place in (63, 127):
        heads.keys[4 * BLOCK_TOKENS + place] = value
        heads.values[4 * BLOCK_TOKENS + place] = value
    found = heads.attend(*segments)
    sees = [row for row, finite in enumerate(torch.isfinite(found).flatten(1).all(1).tolist()) if not finite]
    assert sees == [3, 4, 5, 9], "those of position 63, and the token of the tree that is kept there"
    rest = [row for row in range(12) if row not in sees]
    assert torch.equal(found[rest], expected[rest])


def test_rows_that_only_fill_up_are_zero() -> None:
    heads = Heads.random(Geometry(4, 2, 32), 3)
    found = heads.attend(chain(allocation(1), 5, 3), pad=2)
    assert found.shape == (5, 4, 32)
    assert bool((found[:3] != 0).any())
    assert bool((found[3:] == 0).all())


def test_a_long_context_is_read_in_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, segment = Heads.random(Geometry(9, 3, 64), 30), chain(allocation(*range(6)), 300, 30)
    expected = heads.attend(segment)
    monkeypatch.setattr(attention, "_MOST_TILE_SCORES", 1)
    assert torch.equal(heads.attend(segment), expected)


def test_shorter_vectors_are_for_small_heads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not attention.attends(torch.float32, cpu, 16)
    monkeypatch.setattr(attention, "has_long_vectors", lambda: False)
    assert attention.attends(torch.bfloat16, cpu, 16)
    assert not attention.attends(torch.bfloat16, cpu, 64)
    monkeypatch.setattr(attention, "has_long_vectors", lambda: True)
    assert attention.attends(torch.bfloat16, cpu, 64)


def test_values_of_another_size_are_left_to_torch() -> None:
    segment, cpu = chain(allocation(0), 5, 3), torch.device("cpu")
    assert not attention.attends(torch.bfloat16, cpu, 64, value_dim=32)
    heads = Heads.random(Geometry(4, 2, 64, value_dim=32), 3)
    keys, values = heads.keys.transpose(0, 1)[None], heads.values[..., :32].transpose(0, 1)[None]
    current = Pass([segment], dtype=torch.bfloat16, device=cpu)
    found = current.plan(heads.geometry).attend(heads.queries.flatten(0, 1), keys, values, 0.2, 0.0)
    assert found.shape == (3, 4, 32)
    expected = heads.of_row(1, slots_of(segment, 1, 0))[:, :32]
    assert torch.allclose(found[1].double(), expected, atol=2**-6, rtol=2**-6)
    plan = RowPlan([SessionRows.of(segment, 0, 0)], heads.geometry, 3)
    with pytest.raises(ValueError, match="heads of another size"):
        plan.attend(heads.queries.flatten(0, 1), keys, values, 0.2, 0.0)
