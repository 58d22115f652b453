"""The packed pass equals each session's own pass through transformers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.attention import Segment
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.packed_model import PackedModel
from tests.slow import quick_only
from tests.tiny_models import FAMILIES, QUICK_FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.trees import random_tree

TEXTS = [torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
TOLERANCE = 2e-3


@pytest.fixture(scope="module", params=quick_only(FAMILIES, QUICK_FAMILIES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PackedModel, list[Tensor]]:
    """Return a packed model and the logits [tokens, vocab] transformers gives for each text."""
    folder = save_tiny_model(tmp_path_factory.mktemp("packed"), request.param)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = [model(torch.tensor([text])).logits[0] for text in TEXTS]
    return PackedModel(model, kv_budget_bytes=1 << 20), expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_interleaving_of_chunks_equals_each_text_alone(
    pair: tuple[PackedModel, list[Tensor]], seed: int
) -> None:
    packed, expected = pair
    random = Random(seed)
    # With every other block taken no text finds a run.
    blocks = [packed.pool.allocate(BLOCK_TOKENS) for _ in range(packed.pool.free_tokens // BLOCK_TOKENS)]
    for index, block in enumerate(blocks):
        if index % 2:
            packed.pool.free(block)
    allocations = [packed.pool.allocate(len(text)) for text in TEXTS]
    assert all(allocation.slot_ids is not None for allocation in allocations)
    done = [0] * len(TEXTS)
    while unfinished := [index for index, text in enumerate(TEXTS) if done[index] < len(text)]:
        owners = random.sample(unfinished, random.randint(1, len(unfinished)))
        segments = []
        for index in owners:
            count = min(random.choice([1, 1, 4, 9, 70]), len(TEXTS[index]) - done[index])
            tokens = TEXTS[index][done[index] : done[index] + count]
            segments.append(Segment(allocations[index], done[index], tokens, random.randint(0, count)))
            done[index] += count
        for index, segment, logits in zip(owners, segments, packed.forward(segments), strict=True):
            wanted = expected[index][segment.stop - segment.num_logits : segment.stop]
            assert logits.shape == (segment.num_logits, VOCAB_SIZE)
            assert torch.allclose(logits, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    for allocation in [*allocations, *blocks[::2]]:
        packed.pool.free(allocation)
    assert packed.pool.free_tokens == packed.pool.capacity_tokens


def test_rollback_past_the_window_leaves_no_trace(pair: tuple[PackedModel, list[Tensor]]) -> None:
    packed, expected = pair
    text, allocation = TEXTS[0], packed.pool.allocate(len(TEXTS[0]) + 8)
    packed.forward([Segment(allocation, 0, text[:50], 0)])
    for position in range(50, 80):
        wrong = [255 - token for token in text[position : position + 8]]
        packed.forward([Segment(allocation, position, wrong, 8)])
        logits = packed.forward([Segment(allocation, position, text[position : position + 1], 1)])[0]
        assert torch.allclose(logits[0], expected[0][position], atol=TOLERANCE, rtol=TOLERANCE)
    packed.pool.free(allocation)


def test_what_another_session_left_is_not_seen(pair: tuple[PackedModel, list[Tensor]]) -> None:
    packed, expected = pair
    for tensor in (*packed.pool.keys.values(), *packed.pool.values.values()):
        tensor.fill_(float("nan"))
    text, allocation = TEXTS[0], packed.pool.allocate(len(TEXTS[0]))
    logits = packed.forward([Segment(allocation, 0, text[:40], 40)])[0]
    assert torch.allclose(logits, expected[0][:40], atol=TOLERANCE, rtol=TOLERANCE)
    packed.pool.free(allocation)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32), start=st.sampled_from([1, 13, 16, 40, 58, 63, 64, 65, 80]))
def test_a_tree_gives_every_path_what_it_gets_as_a_chain(
    pair: tuple[PackedModel, list[Tensor]], seed: int, start: int
) -> None:
    packed, expected = pair
    random = Random(seed)
    text = TEXTS[0]
    right = text[start + 1 : start + 1 + random.choice([0, 3, 9])]
    tree = random_tree(random, right, num_wrong=random.choice([2, 25]), vocab_size=VOCAB_SIZE)
    allocation = packed.pool.allocate(len(text) + len(tree))
    packed.forward([Segment(allocation, 0, text[:start], 0)])
    parents = [-1, *(parent + 1 for parent in tree.parents)]
    segment = Segment(allocation, start, [text[start], *tree.token_ids], len(tree) + 1, parents)
    # Another session shares the pass.
    other = packed.pool.allocate(70)
    logits, _ = packed.forward([segment, Segment(other, 0, TEXTS[1][:70], 1)])
    for index in range(len(tree)):
        path = tree.path_to(index)
        tokens = [text[start], *(tree.token_ids[node] for node in path)]
        wanted = packed.forward([Segment(allocation, start, tokens, len(tokens))])[0]
        rows = [0, *(node + 1 for node in path)]
        assert torch.allclose(logits[rows], wanted, atol=TOLERANCE, rtol=TOLERANCE)
        if tokens == text[start : start + len(tokens)]:
            stop = start + len(tokens)
            assert torch.allclose(wanted, expected[0][start:stop], atol=TOLERANCE, rtol=TOLERANCE)
    packed.pool.free(allocation)
    packed.pool.free(other)


def test_a_tree_with_one_path_is_computed_bit_for_bit_as_the_chain(
    pair: tuple[PackedModel, list[Tensor]],
) -> None:
    packed, _ = pair
    text, allocation = TEXTS[0], packed.pool.allocate(len(TEXTS[0]))
    packed.forward([Segment(allocation, 0, text[:50], 0)])
    chain = packed.forward([Segment(allocation, 50, text[50:80], 30)])[0]
    tree = packed.forward([Segment(allocation, 50, text[50:80], 30, range(-1, 29))])[0]
    assert torch.equal(tree, chain)
    packed.pool.free(allocation)


class _TwistedAttention:
    """Makes a model's own attention differ from what the pool's attention computes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forwards = [
            layer.self_attn.o_proj.register_forward_hook(self._twist) for layer in model.model.layers
        ]
        self._model = model

    def _twist(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * 2 if self._model.config._attn_implementation == "eager" else output


def test_a_model_whose_attention_differs_is_refused(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    _TwistedAttention(model)
    with pytest.raises(InvalidArgumentError, match="feature this service does not support"):
        PackedModel(model, kv_budget_bytes=1 << 20)
