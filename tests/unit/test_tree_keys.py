"""Branches of a tree side by side: where their keys go, and that each gets the bits it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy
import numpy.typing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.runtime import attention_plan
from specdec.runtime.attention import Segment, Span
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kv_pool import BLOCK_TOKENS
from specdec.runtime.loading import load_causal_lm
from specdec.runtime.model_pass import Pass
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.rounding import settle_branches
from specdec.runtime.tree_keys import Branches, TreeKeys
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

GROUP, KERNEL = 32, 512
TEXT = torch.randint(0, VOCAB_SIZE, (1700,), generator=torch.Generator().manual_seed(1)).tolist()


def random_parents(random: Random, num_tokens: int) -> list[int]:
    """Return the parents of a tree in any lawful order, deep and wide in places."""
    return [-1, *(random.choice([index - 1, random.randrange(index)]) for index in range(1, num_tokens))]


def path_to(parents: list[int], token: int) -> list[int]:
    return ([] if parents[token] < 0 else path_to(parents, parents[token])) + [token]


def places_of(keys: TreeKeys, token: int) -> list[int]:
    """Return the places of all keys that a token attends to."""
    path = keys.paths[token]
    common = range(path.common, path.common + keys.num_common)
    return [*range(keys.num_shared), *common, *path.own]


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 1600), st.integers(1, 70))
def test_every_path_has_its_keys_in_whole_groups_in_order(
    random: Random, start: int, num_tokens: int
) -> None:
    parents = random_parents(random, num_tokens)
    keys = TreeKeys(start, parents)
    added = [token for token in range(num_tokens) if keys.add(path_to(parents, token))]
    for token in added:
        path, places = path_to(parents, token), places_of(keys, token)
        positions = range(start + len(path))
        assert places == sorted(set(places)), "in order of position"
        owners = [position if position < start else start + path[position - start] for position in positions]
        assert keys.positions()[places].tolist() == owners
        assert [place % GROUP for place in places] == [position % GROUP for position in positions]
        for size in (GROUP, KERNEL):
            parts = {
                (position // size, place // size) for position, place in zip(positions, places, strict=True)
            }
            assert len(parts) == positions[-1] // size + 1, "what is summed up together stays so"
            assert len({place for _, place in parts}) == len(parts), "and apart from what comes after"
    # What did not fit left nothing behind.
    assert set(keys.paths) == {node for token in added for node in path_to(parents, token)}
    assert keys.num_places <= max(2 * (start // KERNEL + 1), start // KERNEL + 2) * KERNEL


def test_a_path_takes_the_places_of_a_chain() -> None:
    for start in (300, 510):
        keys = TreeKeys(start, [-1, 0, 1, 2])
        assert keys.add([0, 1, 2, 3])
        assert keys.tokens == {start: 0, start + 1: 1, start + 2: 2, start + 3: 3}
        assert places_of(keys, 3) == [*range(start + 4)]


def test_where_512_keys_have_no_room_others_begin_with_copies() -> None:
    keys = TreeKeys(1022, [-1, 0, 1, 0, 0])
    assert keys.add([0, 1])
    assert keys.add([0, 3]), "with copies of the keys from 512 on"
    assert places_of(keys, 3) == [*range(512), *range(1024, 1536)]
    assert not keys.add([0, 4]), "a call of its own costs less than more copies"
    assert not keys.add([0, 1, 2]), "its last token is where kernels start afresh"
    assert keys.tokens == {1022: 0, 1023: 1, 1534: 0, 1535: 3} | {1504 + at: at - 30 for at in range(30)}
    early = TreeKeys(510, [-1, 0, 1, 0])
    assert early.add([0, 1])
    assert not early.add([0, 3]), "there are no keys that it could share"
    assert early.add([0, 1, 2]), "where kernels start afresh"
    assert places_of(early, 2) == [*range(513)]


SIZES = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
"""Those of SmolLM2-135M: large enough for branches to share calls."""


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Return a model with full attention, and then a model with windows besides."""
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("tree_keys"), request.param, **SIZES)
    model = load_causal_lm(str(folder), dtype="bfloat16", device="cpu").model
    packed = PackedModel(model, kv_budget_bytes=16 << 20)
    settle_branches(packed)
    return packed


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


SMALL_TREE = [-1, 0, 1, 1, 0]
"""Three branches, the deepest two positions behind the root."""


def tree_spans(packed: PackedModel, branches: Branches, start: int = 40, window: int = 0) -> int:
    """Return how many spans a tree of three branches takes."""
    tree = Segment(packed.pool.allocate(start + 40), start, TEXT[:5], 5, SMALL_TREE)
    current = Pass([tree], dtype=torch.bfloat16, device=packed.device, branches=branches)
    plan = current.plan(Geometry(9, 3, 64, window))
    packed.pool.free(tree.allocation)
    return sum(group.num_spans for group in plan.groups)


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


def attention_shapes(packed: PackedModel, start: int, num_tokens: int) -> set[tuple[int, ...]]:
    """Return the last dimensions of the queries' shapes in all kernel calls over a chain."""
    allocation, seen = packed.pool.allocate(start + num_tokens), set()
    attend = attention_plan.attend

    def note(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen.add(query.shape[2:])
        return attend(query, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "attend", note)
        packed.forward([Segment(allocation, start, TEXT[:num_tokens], num_tokens)])
    packed.pool.free(allocation)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_tokens_with_small_heads_share_no_product(family: str, tmp_path: Path) -> None:
    model = load_causal_lm(str(save_tiny_model(tmp_path, family)), dtype="bfloat16", device="cpu").model
    packed = PackedModel(model, kv_budget_bytes=4 << 20)
    assert attention_shapes(packed, 375, 1) == attention_shapes(packed, 375, 16)


def test_tokens_with_larger_heads_share_products(packed: PackedModel) -> None:
    assert attention_shapes(packed, 340, 1) == {(4, 64)}
    assert attention_shapes(packed, 340, 16) == {(48, 64)}


def test_a_machine_that_rounds_by_the_length_of_a_pass_is_warned_of(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, free = packed.branches, packed.pool.free_tokens
    settle_branches(packed)
    assert not caplog.records
    attend = attention_plan.attend

    def rounds_by_rows(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        output: torch.Tensor = attend(query, *others, **named)
        if query.shape[-2] > 16:
            output[..., -1, -1] += output[..., -1, -1].abs() * 2**-8
        return output

    with monkeypatch.context() as patch:
        patch.setattr(attention_plan, "attend", rounds_by_rows)
        settle_branches(packed)
    assert "the output may depend on the drafts" in caplog.text
    packed.branches = own
    assert packed.pool.free_tokens == free


def test_branches_share_calls_where_that_changes_no_bit(packed: PackedModel) -> None:
    # What settle_branches finds out by trying; the shorter vectors of other CPUs divide sums otherwise.
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert packed.branches is Branches.EXACT
    assert tree_spans(packed, Branches.APART) == 3
    assert tree_spans(packed, Branches.EXACT) == 1
    assert tree_spans(packed, Branches.EXACT, start=500) == 3, "no room before kernels start afresh"
    assert tree_spans(packed, Branches.EXACT, start=1012) == 2, "two of them, one beside copies"
    assert tree_spans(packed, Branches.MASKED, start=500) == 1


@pytest.mark.parametrize("branches", [Branches.EXACT, Branches.MASKED])
def test_branches_share_calls_up_to_the_edge_of_a_window(packed: PackedModel, branches: Branches) -> None:
    # Position 48 is the first that may not attend to position 0 any more.
    assert tree_spans(packed, branches, start=45, window=48) == 1
    assert tree_spans(packed, branches, start=46, window=48) == 3
    assert tree_spans(packed, branches, start=47, window=48) == 3


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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masked_branches_attend_to_their_own_ancestors(family: str, tmp_path: Path) -> None:
    folder, found = save_tiny_model(tmp_path, family, **SIZES), []
    model = load_causal_lm(str(folder), dtype="float32", device="cpu").model
    packed = PackedModel(model, kv_budget_bytes=16 << 20)
    allocation = packed.pool.allocate(600)
    large = random_parents(Random(2), 30)
    # The small tree's deepest tokens are before, at and behind the edge of the windows of 16.
    for start, parents in ((505, large), (13, SMALL_TREE), (14, SMALL_TREE), (15, SMALL_TREE)):
        tree = Segment(allocation, start, TEXT[: len(parents)], len(parents), parents)
        packed.forward([Segment(allocation, 0, TEXT[:start], 0)])
        for branches in (Branches.APART, Branches.MASKED):
            packed.branches = branches
            found += packed.forward([tree])
        assert torch.allclose(*found, atol=1e-3, rtol=1e-3), start
        found.clear()


def test_what_would_change_bits_is_left_apart(packed: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own, free = packed.branches, packed.pool.free_tokens

    def shows_too_much(span: Span) -> numpy.typing.NDArray[numpy.bool_]:
        return numpy.zeros((span.num_queries, span.num_keys), dtype=numpy.bool_)

    for owner, name, replacement in (
        (Span, "hidden", shows_too_much),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
    ):
        packed.branches = Branches.APART
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            settle_branches(packed)
        assert packed.branches is Branches.APART
    settle_branches(packed)
    assert (packed.branches, packed.pool.free_tokens) == (own, free)


def test_branches_of_a_model_in_fp32_stay_apart(tiny_llama: Path) -> None:
    packed = PackedModel(
        load_causal_lm(str(tiny_llama), dtype="float32", device="cpu").model, kv_budget_bytes=1 << 20
    )
    settle_branches(packed)
    assert packed.branches is Branches.APART
