"""The decoder written out equals transformers' own models, for every family and whatever sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.runtime.attention import Segment
from specdec.runtime.decoder.check import compare
from specdec.runtime.decoder.families import FAMILIES as DENSE
from specdec.runtime.decoder.families import why_not
from specdec.runtime.model_pass import Pass
from specdec.runtime.packed_model import SPECDEC, TRANSFORMERS, PackedModel
from tests.slow import quick_only
from tests.tiny_models import FAMILIES, PUBLISHED, QUICK_FAMILIES, VOCAB_SIZE, tiny_config
from tests.trees import random_tree

DENSE_FAMILIES = [family for family in FAMILIES if family != "gemma4-moe"]
LENGTH = 40
ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


def tiny_model(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Make a model with random weights, norms and scalars included."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    for name, value in sizes.items():
        setattr(config, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "layer_scalar" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "bias" in name:
                tensor.normal_()
    return model


@st.composite
def models(draw: st.DrawFn) -> PreTrainedModel:
    """A tiny model of any dense family with sizes of its own."""
    family = draw(st.sampled_from(DENSE_FAMILIES))
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    sizes: dict[str, Any] = {
        "hidden_size": draw(st.sampled_from([16, 24, 48])),
        "intermediate_size": draw(st.sampled_from([8, 40])),
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_kv_heads * draw(st.sampled_from([1, 2, 3])),
        "tie_word_embeddings": draw(st.booleans()),
        # Calm weights: rounding does not grow from layer to layer; a missing feature shows all the same.
        "initializer_range": 0.1,
    }
    if family in ("llama", "qwen3"):
        sizes["attention_bias"] = draw(st.booleans())
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        sizes["rope_parameters"] = draw(st.sampled_from(ROPES))
    if family in ("mistral", "gemma2", "gemma3"):
        sizes["sliding_window"] = draw(st.sampled_from([4, 16, 200]))
    if not family.startswith("gemma4"):
        # A Gemma 4 takes the sizes of its heads when it is made.
        sizes["head_dim"] = draw(st.sampled_from([8, 16, 32]))
    else:
        del sizes["num_key_value_heads"], sizes["num_attention_heads"]
    return tiny_model(family, draw(st.integers(0, 9)), **sizes)


def logits_of(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Return what the model itself answers [tokens, vocab_size]."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error."""
    return float((found - expected).norm() / expected.norm())


@settings(max_examples=25, deadline=None)
@given(model=models(), seed=st.integers(0, 2**32))
def test_any_dense_model_gives_transformers_logits(model: PreTrainedModel, seed: int) -> None:
    random = Random(seed)
    text = [random.randrange(VOCAB_SIZE) for _ in range(LENGTH)]
    start = random.randrange(1, LENGTH - 12)
    tree = random_tree(random, text[start + 1 : start + 4], num_wrong=6, vocab_size=VOCAB_SIZE)
    paths = [tree.path_to(index) for index in range(len(tree))]
    # In float64, for transformers' own rounding would count as ours.
    exact = deepcopy(model).double()
    by_path = [
        logits_of(exact, [*text[: start + 1], *(tree.token_ids[node] for node in path)])[-1] for path in paths
    ]
    whole, other = logits_of(exact, text), logits_of(exact, text[::-1])
    packed = PackedModel(model, kv_budget_bytes=1 << 22)
    assert packed.model_impl == SPECDEC
    first, second = packed.pool.allocate(LENGTH + len(tree)), packed.pool.allocate(LENGTH)
    # A prefill, then a tree beside another session's prefill, then a continuation over the tree's slots.
    (prefill,) = packed.forward([Segment(first, 0, text[:start], start)])
    parents = [-1, *(parent + 1 for parent in tree.parents)]
    packed.joins_branches = random.choice([False, True])
    drafted, beside = packed.forward(
        [
            Segment(first, start, [text[start], *tree.token_ids], len(tree) + 1, parents),
            Segment(second, 0, text[::-1], LENGTH),
        ]
    )
    (rest,) = packed.forward([Segment(first, start, text[start:], LENGTH - start)])
    assert error(torch.cat([prefill, rest]), whole) < 1e-5
    assert error(drafted[1:], torch.stack(by_path)) < 1e-5
    assert error(beside, other) < 1e-5


def test_every_dense_family_has_a_tiny_model() -> None:
    seen = {type(tiny_model(family).get_decoder()).__name__ for family in DENSE_FAMILIES}
    assert seen == set(DENSE)


@pytest.mark.parametrize("family", quick_only([*DENSE_FAMILIES, PUBLISHED], QUICK_FAMILIES))
def test_the_check_changes_no_weight(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    comparison = compare(model)
    assert not comparison.finding
    after = model.state_dict()
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Make a module compute what its weights do not say."""
    return output * 2


def shifted(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Make an embedding of positions another."""
    return output[1], output[0]


@pytest.mark.parametrize(
    ("part", "hook", "named"),
    [
        (lambda model: model.model.layers[2].mlp.act_fn, twice, "layer 2"),
        (lambda model: model.model.layers[1].self_attn.o_proj, twice, "layer 1"),
        (lambda model: model.model.rotary_emb, shifted, "layer 0"),
        (lambda model: model.model.embed_tokens, twice, "the embedding"),
        (lambda model: model.model.norm, twice, "the final norm"),
        (lambda model: model.lm_head, twice, "the LM head"),
    ],
)
def test_a_model_that_computes_otherwise_runs_by_its_own_code(
    part: Callable[[Any], nn.Module], hook: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, text = tiny_model("llama"), list(range(LENGTH))
    part(model).register_forward_hook(hook)
    expected = logits_of(model, text)
    with caplog.at_level(logging.WARNING):
        packed = PackedModel(model, kv_budget_bytes=1 << 20)
    assert packed.model_impl == TRANSFORMERS
    assert named in packed.why_transformers
    (warning,) = caplog.records
    assert named in warning.getMessage()
    allocation = packed.pool.allocate(LENGTH)
    assert error(packed.forward([Segment(allocation, 0, text, LENGTH)])[0], expected) < 1e-5


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is not what it multiplies with."""


def quantised() -> PreTrainedModel:
    """Make a model with one such layer."""
    model = tiny_model("llama")
    layer: Any = model.model.layers[3]
    layer.mlp.down_proj.__class__ = QuantisedLinear
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_model("gemma4-moe"), "its layers have experts"),
        (lambda: tiny_model("olmo2"), "Olmo2Model is not one of"),
        (quantised, "mlp.down_proj is a QuantisedLinear"),
        (
            lambda: tiny_model("llama", rope_parameters={**ROPES[1], "rope_type": "dynamic"}),
            "depends on the length of the text",
        ),
    ],
)
def test_what_is_not_written_out_is_left_as_it_is(
    model: Callable[[], PreTrainedModel], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, text = model(), list(range(LENGTH))
    expected = logits_of(loaded, text)
    assert reason in why_not(loaded)
    packed = PackedModel(loaded, kv_budget_bytes=1 << 20)
    assert packed.model_impl == TRANSFORMERS
    assert not caplog.records, "nothing is wrong with the model"
    allocation = packed.pool.allocate(LENGTH)
    assert error(packed.forward([Segment(allocation, 0, text, LENGTH)])[0], expected) < 1e-5


def test_the_layers_of_a_model_are_given_up(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layers = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    packed = PackedModel(model, kv_budget_bytes=1 << 20)
    assert not [name for layer in layers for name, _ in layer.named_parameters()]
    kept = sum(parameter.numel() for parameter in packed.model.parameters())
    assert kept == 2 * VOCAB_SIZE * 32 + 32, "embedding, head and norm"


class _NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: waits for the device, tensors of host data, shapes that vary."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "lift_fresh",
        "item",
        "unique",
        "masked_select",
        "equal",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in self.FORBIDDEN:
            raise AssertionError(f"{function} waits for the device, or makes a tensor of host data")
        if name == "index" and any(index.dtype is torch.bool for index in args[1] if index is not None):
            raise AssertionError(f"{function} has a result whose shape depends on data")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[_NoWaiting]:
    """Watch a pass."""
    with torch.inference_mode(), _NoWaiting() as mode:
        yield mode


@pytest.mark.parametrize("family", quick_only(DENSE_FAMILIES, QUICK_FAMILIES))
@pytest.mark.parametrize("shape", ["one token", "chain", "tree", "batch"])
def test_a_pass_is_a_function_of_its_buffers(family: str, shape: str) -> None:
    packed = PackedModel(tiny_model(family), kv_budget_bytes=1 << 22)
    allocations = [packed.pool.allocate(LENGTH) for _ in range(3)]
    text = list(range(LENGTH))
    packed.forward([Segment(allocation, 0, text[:20], 0) for allocation in allocations])
    segments = {
        "one token": [Segment(allocations[0], 20, text[20:21], 1)],
        "chain": [Segment(allocations[0], 20, text[20:25], 5)],
        "tree": [Segment(allocations[0], 20, text[20:25], 5, [-1, 0, 1, 1, 0])],
        "batch": [Segment(allocation, 20, text[20:23], 3) for allocation in allocations],
    }[shape]
    current = Pass(segments, dtype=packed.dtype, device=packed.device, joins_branches=True)
    decoder: Any = packed._forward
    decoder.prepare(current)
    expected = torch.cat(packed.forward(segments))
    with no_waiting() as mode:
        found = decoder(current, packed.pool, packed.capture)
    assert mode.num_calls > 4 * len(decoder.layers)
    assert error(found, expected) < 1e-5


def test_the_watch_sees_what_a_graph_cannot_hold() -> None:
    for forbidden in (
        lambda: torch.ones(2).sum().item(),
        lambda: torch.tensor([1, 2]),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[torch.ones(3) > 0],
    ):
        with pytest.raises(AssertionError, match=r"depends on data|host data"), no_waiting():
            forbidden()
