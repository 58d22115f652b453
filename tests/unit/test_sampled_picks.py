"""Sampled picks are those of the whole vocabulary's noise, bit for bit, however few tokens get noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafter_service.drafters.growing import Candidates
from drafter_service.drafters.head import DraftHead
from specdec.contract.draft_tree import DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.contract.token_noise import LARGEST_NOISE, Floats, Keys, Words, gumbel, noise_of
from specdec.runtime import contenders
from specdec.runtime.contenders import picks_of_contenders
from specdec.runtime.noise import GumbelNoise
from specdec.runtime.picks import PickContext, Picker, process_logits, truncate
from specdec.state.weights import TargetWeights

CPU = torch.device("cpu")
NEG_INF = float("-inf")
TEMPERATURES = (0.01, 0.1, 0.3, 0.7, 0.8, 1.0, 1.5, 3.0, 5.0)
SHAPES = ("normal", "peaked", "wide", "flat", "few values", "zipf", "one possible")

# The reference: every token of the vocabulary gets noise


def scores_of_all(logits: Tensor, context: PickContext) -> Tensor:
    """Processed, truncated and perturbed logits [num_rows, vocab_size]."""
    scores = logits.float().clone()
    process_logits(scores, context)
    if context.sampling.is_greedy:
        return scores
    scores.sub_(scores.amax(-1, keepdim=True)).div_(context.sampling.temperature)
    truncate(scores, context.sampling)
    every, seed = range(scores.shape[1]), context.sampling.noise_seed
    noise = [gumbel(seed, position, every) for position in context.positions(len(scores))]
    return scores + torch.from_numpy(np.stack(noise))


def picks_of_all(logits: Tensor, context: PickContext) -> list[int]:
    return scores_of_all(logits, context).argmax(-1).tolist()


def spread(logits: Tensor, draft_vocab: Tensor, vocab_size: int) -> Tensor:
    """Logits over all tokens [num_rows, vocab_size], -inf outside the draft vocabulary."""
    full = logits.new_full((len(logits), vocab_size), NEG_INF)
    return full.index_copy_(1, draft_vocab, logits)


# What is picked from


def random_logits(shape: str, num_rows: int, num_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_rows, num_tokens, generator=generator)
    match shape:
        case "normal":
            return normal * 2.5 + 4
        case "peaked":
            normal[torch.arange(num_rows), torch.randint(num_tokens, (num_rows,), generator=generator)] += 18
            return normal
        case "wide":
            return normal * 1e4
        case "flat":
            return normal * 1e-3 - 7
        case "few values":
            return (normal * 2).round()
        case "zipf":
            return zipf(num_rows, num_tokens, seed)
        case _:
            hidden = torch.full((num_rows, num_tokens), NEG_INF)
            hidden[:, int(torch.randint(num_tokens, (1,), generator=generator))] = -3.0
            return hidden


def zipf(num_rows: int, num_tokens: int, seed: int) -> Tensor:
    """Logits like a language model's: the one of rank r is 2.2 * log(r) below the best."""
    generator = torch.Generator().manual_seed(seed)
    ranked = -2.2 * torch.arange(1.0, num_tokens + 1).log()
    return torch.stack([ranked[torch.randperm(num_tokens, generator=generator)] for _ in range(num_rows)])


@st.composite
def samplings(draw: st.DrawFn, vocab_size: int, *, least_temperature: float = 0.0) -> SamplingParams:
    tokens = st.integers(0, vocab_size - 1)
    return SamplingParams(
        temperature=draw(
            st.sampled_from([t for t in (0.0, 1e-50, 1e-37, *TEMPERATURES, 1e30) if t >= least_temperature])
        ),
        top_k=draw(st.just(0) | st.integers(1, vocab_size)),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6, 0.999, 1 - 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        logit_bias=draw(
            st.just({}) | st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 7.0]), max_size=5)
        ),
        allowed_token_ids=tuple(draw(st.just([]) | st.lists(tokens, max_size=6))),
        seed=draw(st.sampled_from([0, 2**64 - 1]) | st.integers(0, 2**64 - 1)),
    )


@st.composite
def rounds(
    draw: st.DrawFn, vocab_size: int, num_tokens: int, *, least_temperature: float = 0.0
) -> tuple[Tensor, PickContext]:
    """Logits of a session's round and what else its picks depend on."""
    tokens = st.integers(0, vocab_size - 1)
    num_rows = draw(st.integers(1, 5))
    logits = random_logits(
        draw(st.sampled_from(SHAPES)), num_rows, num_tokens, draw(st.integers(0, 2**32 - 1))
    )
    if draw(st.booleans()):
        logits = logits.bfloat16()
    if num_tokens > 1 and draw(st.booleans()):
        logits[:, draw(st.integers(0, num_tokens - 1))] = logits[:, draw(st.integers(0, num_tokens - 1))]
        logits[:, :: draw(st.integers(2, 9))] = NEG_INF
        logits[:, -1] = 0.25
    drafted = draw(st.lists(tokens, min_size=num_rows - 1, max_size=num_rows - 1))
    parents = [draw(st.integers(-1, index - 1)) for index in range(num_rows - 1)]
    is_tree = len(set(zip(drafted, parents, strict=True))) == len(drafted) and draw(st.booleans())
    draft = DraftTree.of(drafted, parents if is_tree else ())
    before = draw(st.lists(tokens, max_size=6))
    sampling = draw(samplings(vocab_size, least_temperature=least_temperature))
    return logits, PickContext(sampling, before, len(before) // 2, draft)


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[tuple[Tensor, PickContext]]]:
    vocab_size = draw(st.integers(1, 40) | st.sampled_from([256, 700, 2048]))
    return vocab_size, draw(st.lists(rounds(vocab_size, vocab_size), min_size=1, max_size=4))


@given(batches())
@settings(max_examples=100)
def test_picks_are_those_of_the_noise_of_all_tokens(
    batch: tuple[int, list[tuple[Tensor, PickContext]]],
) -> None:
    vocab_size, sessions = batch
    before = [logits.clone() for logits, _ in sessions]
    picks = Picker(vocab_size, CPU).pick(*map(list, zip(*sessions, strict=True)))
    assert picks == [picks_of_all(logits, context) for logits, context in sessions]
    assert all(torch.equal(logits, kept) for (logits, _), kept in zip(sessions, before, strict=True))


@st.composite
def draft_batches(draw: st.DrawFn) -> tuple[int, list[int], list[tuple[Tensor, PickContext]]]:
    vocab_size = draw(st.integers(2, 40) | st.sampled_from([700]))
    draft_vocab = sorted(draw(st.sets(st.integers(0, vocab_size - 1), min_size=1)))
    return (
        vocab_size,
        draft_vocab,
        draw(st.lists(rounds(vocab_size, len(draft_vocab)), min_size=1, max_size=4)),
    )


def head_of(
    draft_vocab: Tensor | None, vocab_size: int, sessions: list[tuple[Tensor, PickContext]]
) -> tuple[DraftHead, tuple[Tensor, list[int], list[PickContext], TargetWeights]]:
    """A head, and what its methods get for the sessions of a batch."""
    head = DraftHead(draft_vocab, lambda states: states, torch.float32, vocab_size=vocab_size)
    weights = TargetWeights(torch.zeros(vocab_size, 1), torch.zeros(vocab_size, 1))
    logits = torch.cat([rows.float() for rows, _ in sessions])
    return head, (logits, [len(rows) for rows, _ in sessions], [context for _, context in sessions], weights)


@given(draft_batches())
@settings(max_examples=100)
def test_a_head_of_some_tokens_picks_as_if_all_others_were_impossible(
    batch: tuple[int, list[int], list[tuple[Tensor, PickContext]]],
) -> None:
    vocab_size, token_ids, sessions = batch
    draft_vocab = torch.tensor(token_ids)
    head, asked = head_of(draft_vocab, vocab_size, sessions)
    assert head.pick(*asked) == [
        picks_of_all(spread(logits, draft_vocab, vocab_size), context) for logits, context in sessions
    ]


@given(draft_batches(), st.integers(1, 9))
@settings(max_examples=60)
def test_candidates_of_some_tokens_are_those_of_all_if_the_others_are_impossible(
    batch: tuple[int, list[int], list[tuple[Tensor, PickContext]]], num_candidates: int
) -> None:
    vocab_size, token_ids, sessions = batch
    draft_vocab = torch.tensor(token_ids)
    head, asked = head_of(draft_vocab, vocab_size, sessions)
    found = head.candidates(*asked, num_candidates)
    assert [len(rows) for rows in found] == [len(logits) for logits, _ in sessions]
    for candidates, (logits, context) in zip(found, sessions, strict=True):
        scores = scores_of_all(spread(logits, draft_vocab, vocab_size), context)
        for own, expected in zip(candidates, scores.log_softmax(-1), strict=True):
            assert_are_the_best(own, expected, num_candidates)


def assert_are_the_best(candidates: Candidates, log_probs: Tensor, num_candidates: int) -> None:
    best = log_probs.topk(min(num_candidates, len(log_probs))).values
    assert [value for value, _ in candidates] == pytest.approx(best[best > NEG_INF].tolist(), abs=1e-5)
    assert len({token_id for _, token_id in candidates}) == len(candidates)
    for value, token_id in candidates:
        assert value == pytest.approx(log_probs[token_id].item(), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("truncation", [{}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str)
def test_many_seeds_and_temperatures_on_a_large_vocabulary(shape: str, truncation: dict[str, float]) -> None:
    num_tokens = 5000
    picker = Picker(num_tokens, CPU)
    for seed, temperature in enumerate(TEMPERATURES * 2):
        logits = random_logits(shape, 7, num_tokens, seed)
        context = PickContext(SamplingParams(temperature=temperature, seed=seed, **truncation), [1] * seed, 0)  # type: ignore[arg-type]
        assert picker.pick([logits], [context]) == [picks_of_all(logits, context)]


@given(rounds(256, 256, least_temperature=0.01) | rounds(12, 12, least_temperature=0.01))
@settings(max_examples=80)
def test_contenders_decide_rightly_or_not_at_all(made: tuple[Tensor, PickContext]) -> None:
    logits, context = made
    scores = logits.float().clone()
    process_logits(scores, context)
    every = np.arange(logits.shape[1], dtype=np.uint32)
    found = picks_of_contenders(
        scores.numpy(), every, [context.sampling] * len(scores), context.noise_keys(len(scores))
    )
    for pick, expected in zip(found, picks_of_all(logits, context), strict=True):
        assert pick in (expected, None)


@pytest.mark.parametrize(
    ("sampling", "share"),
    [
        (SamplingParams(temperature=0.3), 0.001),
        (SamplingParams(temperature=0.8), 0.02),
        (SamplingParams(temperature=1.0), 0.1),
        (SamplingParams(temperature=0.8, top_k=50), 0.002),
        (SamplingParams(temperature=0.8, top_p=0.95), 0.001),
        (SamplingParams(temperature=1.0, top_p=0.5, min_p=0.01), 0.001),
        (SamplingParams(temperature=1.0, logit_bias={3: 2.0}, repetition_penalty=1.2), 0.1),
    ],
    ids=str,
)
def test_few_tokens_decide_the_logits_of_a_language_model(
    sampling: SamplingParams, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, context = (
        zipf(16, 49152, seed=1),
        PickContext(sampling, [5, 6, 7], 2, DraftTree(tuple(range(15)))),
    )
    expected = picks_of_all(logits, context)
    assert len(set(expected)) > 1
    counts = []

    def counted(keys: Keys, token_ids: Words) -> Floats:
        counts.append(len(token_ids))
        return noise_of(keys, token_ids)

    def refuse(noise: GumbelNoise, keys: list[int]) -> Tensor:
        raise AssertionError("noise was made for the whole vocabulary")

    monkeypatch.setattr(contenders, "noise_of", counted)
    monkeypatch.setattr(GumbelNoise, "at", refuse)
    assert Picker(49152, CPU).pick([logits], [context]) == [expected]
    assert 32 <= sum(counts) < share * logits.numel()


def test_rows_that_their_contenders_do_not_decide_fall_back_to_all_tokens() -> None:
    rows = torch.zeros(3, 50)
    rows[0, 7] = math.inf
    rows[1] = NEG_INF
    rows[2, 11] = 30.0
    context = PickContext(SamplingParams(temperature=1.0, seed=1), [], 0, DraftTree((1, 2)))
    found = picks_of_contenders(
        rows.numpy(), np.arange(50, dtype=np.uint32), [context.sampling] * 3, context.noise_keys(3)
    )
    assert found == [None, None, 11]
    assert Picker(50, CPU).pick([rows], [context]) == [[7, 0, 11]] == [picks_of_all(rows, context)]


def test_rows_whose_nucleus_is_not_sure_fall_back_to_all_tokens() -> None:
    row, sampling = zipf(1, 4096, seed=1), SamplingParams(temperature=0.8, top_p=0.95, seed=9)
    contexts = [PickContext(sampling, [1] * position, 0) for position in (54, 55, 134, 538)]
    keys = [context.noise_keys(1)[0] for context in contexts]
    rows = row.expand(4, -1).contiguous()
    found = picks_of_contenders(rows.numpy(), np.arange(4096, dtype=np.uint32), [sampling] * 4, keys)
    assert [pick is None for pick in found] == [False, True, True, True]
    picks = Picker(4096, CPU).pick([row] * 4, contexts)
    assert picks == [picks_of_all(row, context) for context in contexts]


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.38, 0.42, 0.5, 0.6, 0.62, 0.66, 0.7, 0.9])
def test_tokens_that_cannot_win_count_in_the_nucleus(top_p: float) -> None:
    vocab_size = 40960
    noise = gumbel(3, 2, range(vocab_size))
    strongest, top = int(noise.argmax()), int(np.abs(noise - 6).argmin())
    # Each of the others is too unlikely to win. Together they have more than a third of the probability.
    row = torch.full((1, vocab_size), float(noise[top]) - LARGEST_NOISE - 0.05)
    row[0, top], row[0, strongest] = 0.0, -0.5
    assert row.softmax(-1)[0, [top, strongest]].sum() < 0.66
    context = PickContext(SamplingParams(temperature=1.0, top_p=top_p, seed=3), [1, 1], 0)
    assert Picker(vocab_size, CPU).pick([row], [context]) == [picks_of_all(row, context)]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 0.8, 3.0])
@pytest.mark.parametrize("highest", [0.0, 0.1, -77.7, 1000.0])
def test_a_token_with_the_largest_noise_wins_from_where_it_reaches_the_likeliest(
    temperature: float, highest: float
) -> None:
    position, lucky, top = 5614, 825, 7
    noise = gumbel(0, position, range(4096))
    assert noise[lucky] == np.float32(LARGEST_NOISE)
    context = PickContext(SamplingParams(temperature=temperature, seed=0), [1] * position, 0)
    picker, winners = Picker(4096, CPU), set()
    logits = torch.full((1, 4096), highest - 1e3 * temperature)
    logits[0, top] = highest
    logits[0, lucky] = highest + temperature * (float(noise[top]) - LARGEST_NOISE)
    step = torch.tensor(-math.inf)
    for _ in range(60):
        logits[0, lucky] = torch.nextafter(logits[0, lucky], -step)
    for _ in range(120):
        [[pick]] = picker.pick([logits], [context])
        assert [pick] == picks_of_all(logits, context)
        winners.add(pick)
        logits[0, lucky] = torch.nextafter(logits[0, lucky], step)
    assert winners == {lucky, top}


@pytest.mark.parametrize(("position", "tied"), [(866, [5172, 8004]), (5722, [2007, 2033])])
def test_the_first_of_equal_scores_is_picked(position: int, tied: list[int]) -> None:
    noise = gumbel(0, position, range(8192))
    assert np.flatnonzero(noise == noise.max()).tolist() == tied
    context = PickContext(SamplingParams(temperature=0.7, seed=0), [9] * position, 0)
    logits = torch.zeros(1, 8192)
    assert Picker(8192, CPU).pick([logits], [context]) == [tied[:1]]
    logits[0, tied[0]] = -1e-3
    assert Picker(8192, CPU).pick([logits], [context]) == [tied[1:]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_picks_the_arg_max_of_its_scores() -> None:
    picker, rows = Picker(4096, torch.device("cuda")), zipf(5, 4096, seed=3).cuda()
    logits = [rows[:2], rows[2:3], rows[3:]]
    temperatures = (0.8, 0.0, 2.0)
    contexts = [PickContext(SamplingParams(temperature=value, seed=8), [1, 2], 0) for value in temperatures]
    picks = [pick for rows in picker.pick(logits, contexts) for pick in rows]
    assert picks == picker.scores(logits, contexts).argmax(-1).tolist()


def test_rows_at_one_position_share_their_noise_and_their_picks() -> None:
    rows = zipf(1, 4096, seed=3).expand(9, -1)
    tree = DraftTree.of([1, 2, 3, 4, 5, 6, 7, 8], [-1, -1, -1, 0, 1, 2, 3, 4])
    context = PickContext(SamplingParams(temperature=2.0, seed=8), [1, 2, 3], 0, tree)
    [picks] = Picker(4096, CPU).pick([rows], [context])
    assert picks == picks_of_all(rows, context)
    assert len(set(picks[1:4])) == len(set(picks[4:7])) == len(set(picks[7:])) == 1
    assert len(set(picks)) > 1
