"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter_service.training.data import TokenData, TokenSequence
from specdec.runtime.attention import Segment
from specdec.runtime.loading import load_causal_lm
from specdec.runtime.packed_model import PackedModel
from tests.tiny_models import save_tiny_model

PROMPT_LENGTH, MAX_LENGTH = 8, 40


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma4", marks=pytest.mark.slow)])
def calm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny target whose next token depends on the last few tokens only: those of random full-size
    models cannot be foreseen.
    """
    folder = save_tiny_model(tmp_path_factory.mktemp("calm") / request.param, request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(0.25)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(calm: Path) -> TokenData:
    """Return greedy answers of the target to random prompts."""
    packed = PackedModel(
        load_causal_lm(str(calm), dtype="float32", device="cpu").model, kv_budget_bytes=2**26
    )
    prompts = numpy.random.default_rng(0).integers(0, 256, (160, PROMPT_LENGTH)).tolist()
    answers = [list(prompt) for prompt in prompts]
    allocations = [packed.pool.allocate(MAX_LENGTH) for _ in prompts]
    segments = [Segment(slots, 0, prompt, 1) for slots, prompt in zip(allocations, prompts, strict=True)]
    while len(answers[0]) < MAX_LENGTH:
        logits = torch.cat(packed.forward(segments))
        for tokens, token in zip(answers, logits.argmax(-1).tolist(), strict=True):
            tokens.append(token)
        segments = [
            Segment(slots, len(tokens) - 1, tokens[-1:], 1)
            for slots, tokens in zip(allocations, answers, strict=True)
        ]
    return TokenData.of([TokenSequence(tuple(tokens), PROMPT_LENGTH) for tokens in answers])
