"""Rounding on a CPU: tokens and branches get the bits they get alone, and a trial sees where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from specdec.runtime import attention_plan
from specdec.runtime.attention import Segment
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels import attention as kernel_attention
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.loading import load_causal_lm
from specdec.runtime.model_pass import Pass
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.rounding import tokens_round_alike, try_rounding
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

TEXT = torch.randint(0, VOCAB_SIZE, (1700,), generator=torch.Generator().manual_seed(1)).tolist()


def random_parents(random: Random, num_tokens: int) -> list[int]:
    """Return the parents of a tree in any lawful order, deep and wide in places."""
    return [-1, *(random.choice([index - 1, random.randrange(index)]) for index in range(1, num_tokens))]


def path_to(parents: list[int], token: int) -> list[int]:
    return ([] if parents[token] < 0 else path_to(parents, parents[token])) + [token]


SIZES = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
"""Those of SmolLM2-135M: large enough for branches to share calls."""


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Return a model with full attention, and then a model with windows besides."""
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("tree_keys"), request.param, **SIZES)
    model = load_causal_lm(str(folder), dtype="bfloat16", device="cpu").model
    return PackedModel(model, kv_budget_bytes=16 << 20)


def trees(random: Random, packed: PackedModel, start: int) -> Iterator[Segment]:
    for num_tokens in (5, 13, 70):
        allocation = packed.pool.allocate(start + num_tokens)
        packed.forward([Segment(allocation, 0, TEXT[:start], 0)])
        tokens = [random.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
        yield Segment(allocation, start, tokens, num_tokens, random_parents(random, num_tokens))


@pytest.mark.parametrize("start", [1, 14, 31, 64, 135, 300, 490, 508, 512, 590, 1000, 1020, 1590])
def test_branches_get_the_bits_they_get_alone(packed: PackedModel, start: int) -> None:
    random = Random(start)
    segments = list(trees(random, packed, start))
    together = packed.forward(segments)
    for tree, logits in zip(segments, together, strict=True):
        paths = [path_to(list(tree.parents), token) for token in range(len(tree.token_ids))]
        for path in paths:
            chain = [tree.token_ids[token] for token in path]
            alone = packed.forward([Segment(tree.allocation, start, chain, len(chain))])[0]
            assert torch.equal(logits[path], alone)
        packed.pool.free(tree.allocation)


@pytest.mark.parametrize("start", [1, 60, 375, 437, 505, 590])
def test_tokens_of_a_chain_get_the_bits_they_get_alone(packed: PackedModel, start: int) -> None:
    allocation = packed.pool.allocate(start + 16)
    packed.forward([Segment(allocation, 0, TEXT[:start], 0)])
    for seed in range(6):
        tokens = torch.randint(0, VOCAB_SIZE, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
        (together,) = packed.forward([Segment(allocation, start, tokens, 16)])
        alone = [
            packed.forward([Segment(allocation, start + index, [token], 1)])[0][0]
            for index, token in enumerate(tokens)
        ]
        assert torch.equal(together, torch.stack(alone))
    packed.pool.free(allocation)


def test_branches_in_scattered_blocks_get_the_bits_of_a_run(packed: PackedModel) -> None:
    start, parents = 100, random_parents(Random(5), 20)
    whole = packed.pool.allocate(start + 40)
    blocks = [packed.pool.allocate(BLOCK_TOKENS) for _ in range(packed.pool.free_tokens // BLOCK_TOKENS)]
    for block in blocks[::2]:
        packed.pool.free(block)
    scattered = packed.pool.allocate(start + 40)
    assert scattered.slot_ids is not None
    found = []
    for allocation in (whole, scattered):
        packed.forward([Segment(allocation, 0, TEXT[:start], 0)])
        found += packed.forward([Segment(allocation, start, TEXT[start : start + 20], 20, parents)])
    assert torch.equal(*found)
    for allocation in (whole, scattered, *blocks[1::2]):
        packed.pool.free(allocation)


SMALL_TREE = [-1, 0, 1, 1, 0]
"""Three branches, the deepest two positions behind the root."""


def num_calls(packed: PackedModel, *, joins_branches: bool) -> int:
    """Return how many spans torch's attention computes a tree of three branches in."""
    tree = Segment(packed.pool.allocate(80), 40, TEXT[:5], 5, SMALL_TREE)
    current = Pass([tree], dtype=torch.float32, device=packed.device, joins_branches=joins_branches)
    plan: Any = current.plan(Geometry(9, 3, 64))
    packed.pool.free(tree.allocation)
    return sum(group.num_spans for group in plan.groups)


def test_branches_share_calls_where_rounding_is_not_kept_anyway(packed: PackedModel) -> None:
    assert num_calls(packed, joins_branches=False) == 3
    assert num_calls(packed, joins_branches=True) == 1
    assert not packed.joins_branches, "on a CPU"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_joined_branches_attend_to_their_own_ancestors(family: str, tmp_path: Path) -> None:
    folder, found = save_tiny_model(tmp_path, family, **SIZES), []
    model = load_causal_lm(str(folder), dtype="float32", device="cpu").model
    packed = PackedModel(model, kv_budget_bytes=16 << 20)
    allocation = packed.pool.allocate(600)
    large = random_parents(Random(2), 30)
    # The small tree's deepest tokens are before, at and behind the edge of the windows of 16.
    for start, parents in ((505, large), (13, SMALL_TREE), (14, SMALL_TREE), (15, SMALL_TREE)):
        tree = Segment(allocation, start, TEXT[: len(parents)], len(parents), parents)
        packed.forward([Segment(allocation, 0, TEXT[:start], 0)])
        for packed.joins_branches in (False, True):
            found += packed.forward([tree])
        assert torch.allclose(*found, atol=1e-3, rtol=1e-3), start
        found.clear()


def test_a_machine_that_rounds_by_the_length_of_a_pass_is_warned_of(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = packed.pool.free_tokens
    assert tokens_round_alike(packed)
    try_rounding(packed)
    assert not caplog.records
    attend = attention_plan.attend

    def rounds_by_rows(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        output: torch.Tensor = attend(query, *others, **named)
        if query.shape[-2] > 16:
            output[..., -1, -1] += output[..., -1, -1].abs() * 2**-8
        return output

    with monkeypatch.context() as patch:
        patch.setattr(kernel_attention, "has_long_vectors", lambda: False)
        patch.setattr(attention_plan, "attend", rounds_by_rows)
        try_rounding(packed)
    assert "the output may depend on the drafts" in caplog.text
    assert packed.pool.free_tokens == free
