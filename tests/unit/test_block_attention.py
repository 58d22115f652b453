"""Attention of DFlash's blocks: by the kernel for CPUs in bf16 it is what torch computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter_service.drafters.dflash import rounds
from drafter_service.drafters.dflash.layers import LayerMask
from drafter_service.drafters.dflash.rounds import BlockRound, PassKv
from specdec.runtime.kernels.library import LIBRARY
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built")

HEADS, KV_HEADS, DIM = 6, 2, 32


class Session:
    def __init__(self, blocks: Sequence[int], num_cached: int) -> None:
        self.allocation = KvAllocation.of(blocks, torch.device("cpu"))
        self.num_cached = num_cached


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def block_round(blocks: Sequence[int], num_cached: int, num_context: int, num_block: int) -> BlockRound:
    session: Any = Session(blocks, num_cached)
    return BlockRound(session, torch.zeros(num_context, 1), range(num_block), num_block - 1)


ALONE = [block_round([3, 4, 5], 100, 7, 8)]
SEVERAL = [*ALONE, block_round([9, 1], 60, 1, 5), block_round([7], 0, 20, 8)]


@pytest.mark.parametrize("parts", [ALONE, SEVERAL], ids=["one session", "several"])
@pytest.mark.parametrize(
    "mask",
    [LayerMask(), LayerMask(reach=30), LayerMask(reach=4), LayerMask(ahead=0), LayerMask(reach=2, ahead=2)],
)
@pytest.mark.parametrize("are_packed", [True, False])
def test_the_kernel_attends_as_torch_does(
    parts: Sequence[BlockRound], mask: LayerMask, are_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = sum(len(part.block) for part in parts)
    num_new = num_rows + sum(len(part.context) for part in parts)
    heads = random(num_new, HEADS + 2 * KV_HEADS, DIM, seed=1).transpose(0, 1)
    queries = heads[:HEADS, num_new - num_rows :]
    keys, values = heads[HEADS : HEADS + KV_HEADS], heads[HEADS + KV_HEADS :]
    if not are_packed:
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    found = []
    for attends in (lambda *_: True, lambda *_: False):
        monkeypatch.setattr(rounds, "attends", attends)
        shape = KvShape(KV_HEADS, DIM, DIM)
        pool = KvPool(
            {0: shape},
            budget_bytes=16 * BLOCK_TOKENS * shape.num_elements * 2,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        pool.keys[0].copy_(random(*pool.keys[0].shape, seed=2))
        pool.values[0].copy_(random(*pool.values[0].shape, seed=3))
        output = PassKv(pool, parts, [mask]).attend(0, queries, keys, values, 0.3)
        assert output.shape == (HEADS, num_rows, DIM)
        found.append((output.float(), pool.keys[0], pool.values[0]))
    (ours, *our_pool), (theirs, *their_pool) = found
    assert torch.allclose(ours, theirs, atol=2**-6, rtol=2**-6)
    assert all(torch.equal(*pair) for pair in zip(our_pool, their_pool, strict=True))
