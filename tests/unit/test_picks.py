"""Picks follow the softmax of the processed logits, and every processor does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.contract.draft_tree import DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.runtime.picks import PickContext, Picker, arg_max, process_logits, top_logprobs, truncate

VOCAB_SIZE = 24
NUM_DRAWS = 100_000


def random_logits(rows: int = 1, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def context(
    sampling: SamplingParams, token_ids: list[int] | None = None, prompt_length: int = 0
) -> PickContext:
    return PickContext(sampling, token_ids or [], prompt_length)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.6, seed=2),
        SamplingParams(temperature=1.0, top_k=5, seed=3),
        SamplingParams(temperature=1.4, top_p=0.8, seed=4),
        SamplingParams(temperature=1.0, min_p=0.1, seed=5),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, seed=6),
    ],
    ids=str,
)
def test_picks_follow_the_softmax(sampling: SamplingParams) -> None:
    logits = random_logits()
    expected = logits[0] / sampling.temperature
    truncate(expected[None], sampling)
    probabilities = expected.softmax(-1).double().numpy()

    picker = Picker(VOCAB_SIZE, torch.device("cpu"))
    counts = np.zeros(VOCAB_SIZE)
    rows = logits.expand(1000, -1)
    for first in range(0, NUM_DRAWS, 1000):
        picks = picker.pick([rows], [context(sampling, [0] * first)])[0]
        counts += np.bincount(picks, minlength=VOCAB_SIZE)

    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected_counts = probabilities[possible] / probabilities.sum() * NUM_DRAWS
    p_value = stats.chisquare(counts[possible], expected_counts).pvalue
    assert p_value > 1e-4


@pytest.mark.parametrize("vocab_size", [24, 256, 300, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arg_max_is_the_first_of_the_largest(vocab_size: int, dtype: torch.dtype) -> None:
    # Few values: every row has many that are largest.
    rows = torch.randint(0, 5, (33, vocab_size), generator=torch.Generator().manual_seed(vocab_size))
    rows[:3] = torch.tensor([-1, 0, 7])[:, None]
    found = arg_max(rows.to(dtype))
    assert found.tolist() == np.argmax(rows.numpy(), axis=-1).tolist()
    hidden = torch.full((2, vocab_size), float("-inf"), dtype=dtype)
    hidden[1, vocab_size - 1] = -1e30
    assert arg_max(hidden).tolist() == [0, vocab_size - 1]


def test_greedy_is_the_arg_max_and_takes_no_noise() -> None:
    picker = Picker(VOCAB_SIZE, torch.device("cpu"))
    logits = random_logits(rows=7)
    for seed in (0, 1):
        picks = picker.pick([logits], [context(SamplingParams(seed=seed))])[0]
        assert picks == logits.argmax(-1).tolist()


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    picker = Picker(VOCAB_SIZE, torch.device("cpu"))
    logits = random_logits(rows=9)
    picks = picker.pick([logits], [context(SamplingParams(temperature=1e-37, seed=3))])[0]
    assert picks == logits.argmax(-1).tolist()


def test_a_batch_gives_each_session_what_it_gets_alone() -> None:
    picker = Picker(VOCAB_SIZE, torch.device("cpu"))
    logits = [random_logits(rows, seed=rows) for rows in (1, 4, 9, 2)]
    contexts = [
        context(SamplingParams(), [1, 2]),
        context(SamplingParams(temperature=1.0, top_p=0.7, seed=9), [1, 2, 3]),
        context(SamplingParams(repetition_penalty=2.0), [4, 4, 5], 1),
        context(SamplingParams(), [7]),
    ]
    together = picker.pick(logits, contexts)
    alone = [
        picker.pick([rows], [pick_context])[0] for rows, pick_context in zip(logits, contexts, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("vocab_size", [24, 1000, 5000])
@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (SamplingParams(top_k=7), TopKLogitsWarper(7)),
        (SamplingParams(top_p=0.4), TopPLogitsWarper(0.4)),
        (SamplingParams(top_p=0.95), TopPLogitsWarper(0.95)),
        (SamplingParams(top_p=0.999), TopPLogitsWarper(0.999)),
        (SamplingParams(min_p=0.2), MinPLogitsWarper(0.2)),
    ],
    ids=["top_k", "top_p 0.4", "top_p 0.95", "top_p 0.999", "min_p"],
)
def test_truncation_keeps_what_transformers_keeps(
    sampling: SamplingParams, warper: TopKLogitsWarper, vocab_size: int
) -> None:
    logits = random_logits(5, vocab_size)
    expected = warper(torch.zeros(5, 0, dtype=torch.long), logits.clone())
    truncate(logits, sampling)
    assert torch.equal(logits.isinf(), expected.isinf())


def test_top_p_keeps_at_least_one_token_of_a_flat_distribution() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 5] = 1e-3
    truncate(logits, SamplingParams(top_p=1e-6))
    assert logits.isfinite().nonzero().tolist() == [[0, 5]]


def test_repetition_penalty_is_transformers() -> None:
    logits, token_ids = random_logits(), [3, 3, 8, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([token_ids]), logits.clone())
    process_logits(logits, context(SamplingParams(repetition_penalty=1.7), token_ids, prompt_length=2))
    assert torch.allclose(logits, expected)


def test_presence_and_frequency_count_the_output_and_the_draft_before_a_row() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    process_logits(logits, PickContext(sampling, [1, 2, 3, 3], 2, DraftTree((4, 3))))
    assert logits[0, [1, 2, 3, 4]].tolist() == [0, 0, -1.0, 0]
    assert logits[1, [1, 2, 3, 4]].tolist() == [0, 0, -1.0, -0.75]
    assert logits[2, [1, 2, 3, 4]].tolist() == [0, 0, -1.25, -0.75]


def test_bias_and_allowed_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    process_logits(logits, context(SamplingParams(logit_bias={4: 2.5, 6: -1.0}, allowed_token_ids=(4, 5))))
    assert logits[0, 4] == 2.5
    assert logits[0, 5] == 0
    assert logits.isfinite().sum() == 2


def test_each_row_has_a_mask_of_its_own() -> None:
    vocab_size = 70
    masks = torch.zeros(3, 3, dtype=torch.int32)
    for row, tokens in enumerate(([0, 31, 64], [5], list(range(70)))):
        for token in tokens:
            masks[row, token // 32] |= torch.tensor(1 << token % 32).to(torch.int32)
    logits = random_logits(3, vocab_size)
    expected = logits.clone()
    expected[0, [token for token in range(70) if token not in (0, 31, 64)]] = float("-inf")
    expected[1, [token for token in range(70) if token != 5]] = float("-inf")
    picker = Picker(vocab_size, torch.device("cpu"))
    for sampling in (
        SamplingParams(),
        SamplingParams(temperature=2.0, seed=1),
        SamplingParams(temperature=0.8, top_p=0.7, top_k=4, seed=2, presence_penalty=1.0),
    ):
        masked = PickContext(sampling, [1, 5], 1, DraftTree((4, 3)), masks)
        open_to_all = PickContext(sampling, [1, 5], 1, DraftTree((4, 3)))
        plain, free = picker.pick([logits, logits], [masked, open_to_all])
        assert plain == picker.pick([expected], [open_to_all])[0]
        assert free == picker.pick([logits], [open_to_all])[0]
        assert plain[0] in (0, 31, 64)
        assert plain[1] == 5


def test_logits_given_are_left_alone() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sampling = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0)
    Picker(VOCAB_SIZE, torch.device("cpu")).pick([logits], [context(sampling, [1, 2])])
    assert torch.equal(logits, before)


def test_top_logprobs() -> None:
    logits = random_logits(2)
    expected = logits.log_softmax(-1)
    rows = top_logprobs(logits, [3, 4], 2)
    for row, (own, best) in enumerate(rows):
        assert own == pytest.approx(expected[row, 3 + row].item())
        assert [token for token, _ in best] == expected[row].topk(2).indices.tolist()
    assert top_logprobs(logits, [3, 4], 0)[0][1] == []
