"""Passes that are filled up to a bucket: the same answers, and one computation for all of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.runtime.attention import Segment
from specdec.runtime.bucket import Bucket, fits
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.runtime.model_pass import Pass
from specdec.runtime.packed_model import PackedModel
from tests.slow import quick_only
from tests.tiny_models import FAMILIES, VOCAB_SIZE
from tests.trees import random_tree
from tests.unit.test_decoder import tiny_model

TEXTS = [[Random(seed).randrange(VOCAB_SIZE) for _ in range(90)] for seed in (1, 2)]


@pytest.fixture(scope="module", params=quick_only(FAMILIES, ["llama", "gemma4", "gemma4-shared-kv"]))
def packed(request: pytest.FixtureRequest) -> PackedModel:
    """Return a model with calm weights, so that no rounding grows."""
    return PackedModel(tiny_model(request.param, initializer_range=0.1), kv_budget_bytes=1 << 22)


def scattered(packed: PackedModel, num_tokens: int) -> KvAllocation:
    """Return an allocation whose blocks are no run."""
    blocks = [packed.pool.allocate(BLOCK_TOKENS) for _ in range(6)]
    for block in blocks[::2]:
        packed.pool.free(block)
    held = packed.pool.allocate(packed.pool.free_tokens - 3 * BLOCK_TOKENS)
    allocation = packed.pool.allocate(num_tokens)
    for block in (*blocks[1::2], held):
        packed.pool.free(block)
    assert allocation.slot_ids is not None
    return allocation


def rounds(packed: PackedModel, random: Random, allocations: Sequence[KvAllocation]) -> list[Segment]:
    """Return a round of each session after prefills of its own length: a token, a chain or a tree."""
    segments = []
    for allocation, text in zip(allocations, TEXTS, strict=False):
        start = random.choice([1, 3, 15, 16, 17, 40, 63, 64, 70])
        packed.forward([Segment(allocation, 0, text[:start], 0)])
        tree = random_tree(random, text[start + 1 : start + 3], num_wrong=4, vocab_size=VOCAB_SIZE)
        shapes: list[tuple[list[int], Sequence[int]]] = [
            (text[start : start + 1], ()),
            (text[start : start + 5], ()),
            ([text[start], *tree.token_ids], [-1, *(parent + 1 for parent in tree.parents)]),
        ]
        tokens, parents = random.choice(shapes)
        segments.append(Segment(allocation, start, tokens, len(tokens), parents))
    return segments


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        mine.shape == wanted.shape and torch.allclose(mine, wanted, atol=1e-5, rtol=1e-4)
        for mine, wanted in zip(found, expected, strict=True)
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), num_sessions=st.integers(1, 2))
def test_filling_up_changes_no_answer(packed: PackedModel, seed: int, num_sessions: int) -> None:
    random = Random(seed)
    allocations = [packed.pool.allocate(128), scattered(packed, 128)][:num_sessions]
    segments = rounds(packed, random, allocations)
    expected = packed.forward(segments)
    stored = [packed.pool.keys[0][part.allocation.slots(0, part.stop)].clone() for part in segments]
    packed.fills_up = True
    try:
        found = packed.forward(segments)
    finally:
        packed.fills_up = False
    assert close(found, expected)
    assert close([packed.pool.keys[0][part.allocation.slots(0, part.stop)] for part in segments], stored)
    for allocation in allocations:
        packed.pool.free(allocation)


class _Trace(TorchDispatchMode):
    """Notes every operation with the shapes that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves(args)
        self.calls.append((function.name(), *(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))))
        return function(*args, **(kwargs or {}))


def trace(packed: PackedModel, current: Pass) -> list[tuple[Any, ...]]:
    """Return what a pass computes."""
    decoder: Any = packed._forward
    with torch.inference_mode(), _Trace() as mode:
        decoder(current, packed.pool, packed.capture)
    return mode.calls


def test_a_recorded_pass_runs_any_other_of_its_bucket(packed: PackedModel) -> None:
    first, second = packed.pool.allocate(100), scattered(packed, 100)
    if packed.model_impl != "specdec":
        pytest.skip("the model's own code is not recorded")
    packed.fills_up = True
    text = TEXTS[0]
    packed.forward([Segment(first, 0, text[:20], 0)])
    packed.forward([Segment(second, 0, text[:75], 0)])
    recorded, other = (
        packed._pass(segments)
        for segments in (
            [Segment(first, 20, text[20:25], 5)],
            [Segment(second, 75, text[75:83], 8, [-1, 0, 1, 1, 0, 4, 4, 2])],
        )
    )
    decoder: Any = packed._forward
    for current in (recorded, other):
        decoder.prepare(current)
    assert recorded.bucket == other.bucket
    assert trace(packed, recorded) == trace(packed, other)
    with torch.inference_mode():
        expected = other.split(decoder(other, packed.pool, packed.capture))
        # What a replay does: other values in the same memory.
        for buffer, values in zip(recorded.buffers(), other.buffers(), strict=True):
            buffer.copy_(values)
        found = other.split(decoder(recorded, packed.pool, packed.capture))
    assert close(found, expected)
    packed.fills_up = False
    for allocation in (first, second):
        packed.pool.free(allocation)


def test_buckets_are_few() -> None:
    slots = KvAllocation((0,), None)
    sizes = [(start, size) for start in range(1, 2000, 7) for size in range(1, 17)]
    segments = [[Segment(slots, start, [1] * size, size)] for start, size in sizes]
    buckets = {Bucket.of(segment) for segment in segments}
    assert {bucket.num_rows for bucket in buckets} == {1, 2, 4, 8, 16}
    assert {bucket.num_keys for bucket in buckets} == {256, 512, 1024, 2048}
    for (segment,) in segments:
        bucket = Bucket.of([segment])
        assert bucket.num_queries >= len(segment.token_ids)
        assert bucket.num_keys >= segment.stop
        (span,) = bucket.spans([segment], window=16)
        assert span.num_keys == bucket.keys_in(16) <= 32
        assert not span.hidden()[0].all()


def test_a_prefill_is_not_filled_up() -> None:
    slots = KvAllocation((0,), None)
    token, chunk = Segment(slots, 9, [1], 1), Segment(slots, 0, [1] * 9, 0)
    assert fits([token])
    assert not fits([chunk])
    assert not fits([token, chunk])
    assert not fits([Segment(slots, 9, [1] * 65, 65)])
