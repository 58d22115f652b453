"""Drafts from a table of what the target usually says: the text is the target's own, in fewer rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter_service.drafters.ngram_lm.table import TargetVocabulary
from drafter_service.training.config import CountOptions
from drafter_service.training.data import TokenData, TokenSequence
from drafter_service.training.ngram_lm import count
from specdec.client import GenerateOptions
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.models.files import model_id, vocabulary_fingerprint
from specdec.transport.handshake import make_handshake
from tests.integration.test_lossless import PROMPTS
from tests.raw_streams import draft_stream
from tests.slow import quick_only
from tests.systems import running_drafter, running_system
from tests.tiny_models import VOCAB_SIZE

NUM_TOKENS = 60
OPTIONS = GenerateOptions(max_new_tokens=NUM_TOKENS, ignore_eos=True)
EVERYTHING = CountOptions(min_count=1, min_gain=0.0)
SAMPLED = SamplingParams(temperature=0.8, seed=3)
ALL_PROMPTS = (*PROMPTS, [200, 201, 202])
"""The last is in no table."""


@pytest.fixture(scope="module")
def answers(tiny_llama: Path) -> TokenData:
    """Return what the tiny target answers to the prompts."""
    target = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    sequences = []
    for prompt in PROMPTS:
        token_ids = list(prompt)
        for _ in range(NUM_TOKENS):
            token_ids.append(int(target(torch.tensor([token_ids])).logits[0, -1].argmax()))
        sequences.append(TokenSequence(tuple(token_ids), len(prompt)))
    return TokenData.of(sequences)


@pytest.fixture(scope="module")
def vocabulary(tiny_llama: Path) -> TargetVocabulary:
    return TargetVocabulary(model_id(str(tiny_llama)), vocabulary_fingerprint(tiny_llama), VOCAB_SIZE)


@pytest.fixture(scope="module")
def table(answers: TokenData, vocabulary: TargetVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    count(answers, range(len(answers)), vocabulary, EVERYTHING).save(folder)
    return folder


@pytest.mark.parametrize(
    ("sampling", "prompts"),
    quick_only(
        [(SamplingParams(), ALL_PROMPTS), (SAMPLED, ALL_PROMPTS[-2:]), (SAMPLED, ALL_PROMPTS[:-2])],
        [(SamplingParams(), ALL_PROMPTS), (SAMPLED, ALL_PROMPTS[-2:])],
    ),
    ids=["greedy", "sampled", "sampled-more"],
)
async def test_a_table_gives_the_same_text(
    sampling: SamplingParams, prompts: Sequence[Sequence[int]], tiny_llama: Path, table: Path
) -> None:
    common = replace(OPTIONS, sampling=sampling)
    async with running_system(tiny_llama, "ngram", f"ngram-lm:{table}") as system:
        for prompt in prompts:
            plain = await system.client.generate(prompt, replace(common, method="none"))
            for method in ("ngram-lm", "ngram+ngram-lm"):
                for draft_nodes in (0, 14):
                    options = replace(common, draft_depth=4, draft_nodes=draft_nodes)
                    answer = await system.client.generate(prompt, replace(options, method=method))
                    assert answer.token_ids == plain.token_ids, (prompt, method, draft_nodes)
                    speculation = answer.speculation
                    assert (speculation.method, speculation.num_fallback_rounds) == (method, 0)
                    assert not any(part.num_fallback_rounds for part in speculation.proposers)
                    assert speculation.num_draft_tokens > 0
                    if sampling.is_greedy and prompt in PROMPTS:
                        # Every answer was counted: hardly a draft is wrong.
                        assert speculation.num_rounds < 20


async def test_the_table_knows_what_the_text_has_not_said_yet(tiny_llama: Path, table: Path) -> None:
    options = replace(OPTIONS, draft_depth=4, max_new_tokens=30)
    async with running_system(tiny_llama, "ngram", f"usual=ngram-lm:{table}") as system:
        copying, usual = [
            (await system.client.generate(PROMPTS[1], replace(options, method=method))).speculation
            for method in ("ngram", "usual")
        ]
    assert usual.num_accepted_tokens > copying.num_accepted_tokens
    assert usual.num_rounds < copying.num_rounds


async def test_a_table_of_another_vocabulary_is_not_used(
    tiny_llama: Path, answers: TokenData, vocabulary: TargetVocabulary, tmp_path: Path
) -> None:
    other = replace(vocabulary, fingerprint="another")
    count(answers, range(len(answers)), other, EVERYTHING).save(tmp_path)
    async with running_system(tiny_llama, "ngram", f"ngram-lm:{tmp_path}") as system:
        plain = await system.client.generate(PROMPTS[0], replace(OPTIONS, method="none"))
        answer = await system.client.generate(PROMPTS[0], replace(OPTIONS, method="ngram-lm"))
    assert answer.token_ids == plain.token_ids
    assert answer.speculation.num_draft_tokens == 0
    assert "vocabularies differ" in answer.speculation.fallback_reason


async def test_a_round_says_how_likely_a_path_must_be(table: Path, vocabulary: TargetVocabulary) -> None:
    handshake = make_handshake(vocabulary_fingerprint=vocabulary.fingerprint)
    prompt = list(PROMPTS[0])

    async def lengths(*confidences: float, sampling: SamplingParams | None = None) -> list[int]:
        async with running_drafter(f"ngram-lm:{table}") as (address, _), draft_stream(address) as stream:
            fields = {"sampling": sampling.to_proto()} if sampling else {}
            await stream.open("ngram-lm", prompt, handshake=handshake, **fields)
            length, found = len(prompt), list[int]()
            for confidence in confidences:
                draft = await stream.round([], length, 6, min_path_confidence=confidence)
                found.append(len(draft))
            return found

    free, cut, free_again = await lengths(0.0, 1.0, 0.0)
    assert free == free_again > cut == 1
    assert await lengths(0.0, 1.0, sampling=SAMPLED) == (await lengths(0.0, sampling=SAMPLED)) * 2
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match="min_path_confidence is"):
            await lengths(wrong)
