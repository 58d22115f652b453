"""Passes over sessions that gave blocks back: the logits of those that did not, whatever is there by now."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdec.runtime.attention import Segment
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.runtime.packed_model import GivingBack, PackedModel
from tests.unit.test_decoder import tiny_model

CHUNK = 48
TEXTS = [[(7 * place + 3 * place // 5 + first) % 250 for place in range(300)] for first in (1, 90)]
TREE = (-1, 0, 1, 0, 3, 4, 2)


def packed(family: str, dtype: torch.dtype, giving_back: GivingBack | None) -> PackedModel:
    model = tiny_model(family, initializer_range=0.1).to(dtype)
    return PackedModel(model, kv_budget_bytes=1 << 21, giving_back=giving_back)


def spoil(target: PackedModel, allocations: Sequence[KvAllocation]) -> None:
    """Write what nobody may read into all blocks of layers with a window that no session has."""
    group = target.pool.sliding
    assert group
    held = {block for each in allocations if each.sliding for block in each.sliding.held_blocks}
    others = [block for block in range(group.num_blocks) if block not in held]
    for layer in target.pool.keys:
        if target.pool.is_sliding(layer):
            for tensor in (target.pool.keys[layer], target.pool.values[layer]):
                tensor.view(group.num_blocks, BLOCK_TOKENS, *tensor.shape[1:])[others] = float("nan")


def read(target: PackedModel, round_tokens: int) -> list[Tensor]:
    """Return the logits of texts that are read in chunks, then in rounds of chains, then of a tree."""
    pool, length = target.pool, len(TEXTS[0])
    allocations = [pool.allocate(length + len(TREE), will_grow=pool.sliding is not None) for _ in TEXTS]
    logits: list[Tensor] = []

    def run(start: int, num_tokens: int, parents: Sequence[int] = ()) -> None:
        for index, allocation in enumerate(allocations):
            rest = pool.give_back(allocation, start)
            grown = pool.grow(rest, start + num_tokens) if start + num_tokens > rest.capacity else rest
            assert grown
            allocations[index] = grown
        if pool.sliding:
            spoil(target, allocations)
        logits.extend(
            target.forward(
                [
                    Segment(allocation, start, text[start : start + num_tokens], num_tokens, parents)
                    for allocation, text in zip(allocations, TEXTS, strict=True)
                ]
            )
        )

    for start in range(0, 240, CHUNK):
        run(start, CHUNK)
    for start in range(240, length - len(TREE), round_tokens):
        run(start, round_tokens)
    run(length - len(TREE), len(TREE), TREE)
    if pool.sliding:
        assert max(len(each.sliding.held_blocks) for each in allocations if each.sliding) <= 3
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma4", "gemma2", "gemma4-moe"])
def test_what_was_given_back_is_never_read(family: str, dtype: torch.dtype) -> None:
    keeping, giving = packed(family, dtype, None), packed(family, dtype, GivingBack(64, 300))
    for found, expected in zip(read(giving, 5), read(keeping, 5), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["gemma4", "gemma2"])
def test_nor_is_it_where_passes_are_filled_up(family: str) -> None:
    keeping, giving = packed(family, torch.float32, None), packed(family, torch.float32, GivingBack(64, 300))
    giving.fills_up = giving.joins_branches = True
    for found, expected in zip(read(giving, 5), read(keeping, 5), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_moving_the_accepted_path_moves_it_in_all_layers() -> None:
    target = packed("gemma4", torch.float32, GivingBack(64, 300))
    pool = target.pool
    allocation = pool.give_back(pool.allocate(200), 200)
    for layer, tensor in (*pool.keys.items(), *pool.values.items()):
        rows = torch.arange(len(tensor), dtype=torch.float32)[:, None, None].expand_as(tensor) + layer
        tensor.copy_(rows)
    sources, targets = torch.tensor([195, 198]), torch.tensor([194, 195])
    before = {
        layer: keys[allocation.table(pool.is_sliding(layer)).slots_at(sources)].clone()
        for layer, keys in pool.keys.items()
    }
    pool.move(allocation, sources, targets, ())
    for layer, keys in pool.keys.items():
        assert torch.equal(keys[allocation.table(pool.is_sliding(layer)).slots_at(targets)], before[layer])
