"""Drafters' layers written out compute what transformers' own layers compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MuseGlimmerAssistantModel

from drafter_service.drafters.dflash.forward import BlockForward
from drafter_service.drafters.dflash.layers import BlockLayers
from drafter_service.drafters.mtp.forward import AssistantForward, assistant_step
from drafter_service.drafters.mtp.layers import AssistantLayers
from drafter_service.drafters.mtp.rounds import PaddedKv, RoundKv, SessionKv
from tests.tiny_assistants import FAMILIES, save_tiny_assistant
from tests.tiny_dflash import save_tiny_dflash

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def target_kv(layers: Any, lengths: list[int]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return random keys and values of sessions by attention type, in the sizes that an assistant reads."""
    return {
        layer.self_attn.layer_type: [
            tuple(
                torch.randn(
                    length,
                    layer.self_attn.q_proj.out_features
                    // layer.self_attn.head_dim
                    // layer.self_attn.num_key_value_groups,
                    layer.self_attn.head_dim,
                )
                for _ in range(2)
            )
            for length in lengths
        ]
        for layer in layers
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_an_assistant_takes_the_same_steps(family: str, tmp_path: Path) -> None:
    folder = save_tiny_assistant(tmp_path, family)
    own, taken = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for model in (own, taken):
        torch.manual_seed(0)
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    counts, kv = [1, 3], target_kv(own.model.layers, [25, 9])
    theirs, ours = AssistantLayers(own), assistant_step(taken)
    assert isinstance(ours, AssistantForward)
    for positions in ([24] * 4, [24] * 4, [24, 8, 8, 8], [30] * 4):
        by_kind: Any = {kind: SessionKv(sessions, counts) for kind, sessions in kv.items()}
        embeddings, hidden = torch.randn(4, 32), torch.randn(4, 32)
        expected = theirs.step(embeddings, hidden, positions, by_kind)
        for found, wanted in zip(ours.step(embeddings, hidden, positions, by_kind), expected, strict=True):
            assert torch.allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("window", [None, 5, 30])
def test_sessions_side_by_side_attend_as_each_does_alone(window: int | None) -> None:
    """Of rounds that go on, whatever their rows and lengths are."""
    torch.manual_seed(0)
    lengths, num_heads, head_dim = [25, 1, 9], 4, 16
    kv = [(torch.randn(length, 2, head_dim), torch.randn(length, 2, head_dim)) for length in lengths]
    together = RoundKv(kv)
    for running, counts in (([0, 1, 2], [1, 1, 1]), ([0, 2], [3, 1]), ([1], [2]), ([0, 1, 2], [2, 4, 1])):
        queries = torch.randn(num_heads, sum(counts), head_dim)
        alone = SessionKv([kv[at] for at in running], counts).attend(queries, 0.3, window)
        found = together.of(running, counts)
        assert isinstance(found, PaddedKv) == (len(running) > 1)
        assert torch.allclose(found.attend(queries, 0.3, window), alone, **CLOSE)
        assert together.of(running, counts) is found, "steps of the same rounds share it"


def test_long_texts_are_not_copied() -> None:
    kv = [(torch.zeros(20_000, 1, 4), torch.zeros(20_000, 1, 4))] * 2
    assert isinstance(RoundKv(kv).of([0, 1], [1, 1]), SessionKv)


def test_an_assistant_with_experts_takes_its_own_steps(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_assistant(tmp_path, "gemma4"), dtype=torch.float32)
    model.model.layers[1].enable_moe_block = True
    assert isinstance(assistant_step(model), AssistantLayers)


@dataclass
class WholeKv:
    """Keys and values of a block and its context, all of which a query sees; remembers what it was given."""

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attend from the block's rows."""
        self.seen.append((layer, queries, keys, values))
        attended: Tensor = scaled_dot_product_attention(
            queries[None], keys[None], values[None], scale=scaling, enable_gqa=True
        )
        return attended[0]


@pytest.mark.parametrize("num_context", [1, 7])
@torch.inference_mode()
def test_a_block_goes_through_the_same_layers(num_context: int, tmp_path: Path) -> None:
    folder = save_tiny_dflash(tmp_path)
    own, taken = (MuseGlimmerAssistantModel.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    theirs, ours, kv, same = BlockLayers(own), BlockForward(taken), WholeKv(), WholeKv()
    inputs = (
        torch.randn(num_context, 32),
        torch.randn(5, 32),
        torch.arange(20, 20 + num_context),
        torch.arange(20 + num_context, 25 + num_context),
    )
    assert torch.allclose(ours(*inputs, same), theirs(*inputs, kv), **CLOSE)
    assert [layer for layer, *_ in same.seen] == [0, 1]
    for (_, *found), (_, *expected) in zip(same.seen, kv.seen, strict=True):
        for mine, wanted in zip(found, expected, strict=True):
            assert mine.shape == wanted.shape
            assert torch.allclose(mine, wanted, **CLOSE)
