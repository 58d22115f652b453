"""The draft model's rollback: whatever the target accepts, drafts depend on the committed tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from drafter_service.drafters.base import DraftItem
from drafter_service.drafters.causal_lm.drafter import CausalLmDrafter, CausalLmSession, OpenDraft
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.sampling import SamplingParams
from specdec.runtime.loading import load_causal_lm
from tests.tiny_models import VOCAB_SIZE

CONTEXT = 512
CAPACITY = 2048
"""Tokens of 512 bytes each in a pool of 1 MiB."""
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=1.0, repetition_penalty=1.3, seed=5))


@pytest.fixture(scope="module")
def drafter(tiny_llama: Path) -> CausalLmDrafter:
    loaded = load_causal_lm(str(tiny_llama), dtype="float32", device="cpu")
    return CausalLmDrafter("small", loaded, kv_budget_bytes=2**20, max_draft_depth=16)


@contextmanager
def session_of(
    drafter: CausalLmDrafter,
    token_ids: Sequence[int],
    *,
    prompt_length: int = 1,
    max_length: int = 200,
    sampling: SamplingParams = SAMPLINGS[0],
) -> Iterator[CausalLmSession]:
    session = drafter.open(OpenDraft(tuple(token_ids), prompt_length, max_length, sampling))
    try:
        yield session
    finally:
        drafter.close(session)


def item(drafter: CausalLmDrafter, session: CausalLmSession, draft_depth: int) -> DraftItem:
    return DraftItem(drafter, session, draft_depth, session.num_prefill_tokens + 1)


def draft(drafter: CausalLmDrafter, session: CausalLmSession, draft_depth: int) -> list[int]:
    (tokens,) = drafter.propose([item(drafter, session, draft_depth)])
    return tokens


def fresh_draft(drafter: CausalLmDrafter, session: CausalLmSession, draft_depth: int) -> list[int]:
    """Return the draft that a session without earlier drafts makes of the same committed tokens."""
    with session_of(
        drafter,
        session.token_ids,
        prompt_length=session.prompt_length,
        max_length=session.max_length,
        sampling=session.sampling,
    ) as fresh:
        return draft(drafter, fresh, draft_depth)


ROUNDS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 6), st.lists(st.integers(0, 255), min_size=1, max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=20),
    rounds=ROUNDS,
    sampling=st.sampled_from(SAMPLINGS),
)
def test_drafts_depend_on_the_committed_tokens_alone(
    drafter: CausalLmDrafter,
    prompt: list[int],
    rounds: list[tuple[int, int, list[int]]],
    sampling: SamplingParams,
) -> None:
    with session_of(drafter, prompt, prompt_length=len(prompt), sampling=sampling) as session:
        for draft_depth, num_accepted, corrections in rounds:
            expected = fresh_draft(drafter, session, draft_depth)
            actual = draft(drafter, session, draft_depth)
            assert actual == expected
            assert len(actual) == draft_depth
            committed = [*actual[:num_accepted], *corrections]
            session.commit(committed, len(session.token_ids) + len(committed))


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=2, max_size=5),
    counts=st.lists(st.integers(0, 5), min_size=5, max_size=5),
)
def test_sessions_in_one_batch_draft_as_each_alone(
    drafter: CausalLmDrafter, prompts: list[list[int]], counts: list[int]
) -> None:
    sessions = [drafter.open(OpenDraft(tuple(prompt), len(prompt), 100)) for prompt in prompts]
    try:
        for _ in range(3):
            # A count of 0 is a prefill chunk, which shares the pass with the others' drafts.
            wanted = counts[: len(sessions)]
            expected = [
                fresh_draft(drafter, session, count) if count else []
                for session, count in zip(sessions, wanted, strict=True)
            ]
            items = [item(drafter, session, count) for session, count in zip(sessions, wanted, strict=True)]
            assert drafter.propose(items) == expected
            for session, tokens in zip(sessions, expected, strict=True):
                committed = [*tokens[:2], 77]
                session.commit(committed, len(session.token_ids) + len(committed))
            counts = counts[::-1]
    finally:
        for session in sessions:
            drafter.close(session)


def test_greedy_drafts_are_the_models_own_continuation(drafter: CausalLmDrafter, tiny_llama: Path) -> None:
    prompt = [5, 6, 7, 5, 6]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with session_of(drafter, prompt) as session:
        assert draft(drafter, session, 10) == output[0, len(prompt) :].tolist()


def test_a_prompt_read_in_chunks_drafts_the_same(drafter: CausalLmDrafter) -> None:
    prompt = list(range(100, 140))
    with session_of(drafter, prompt) as session:
        expected = fresh_draft(drafter, session, 5)
        while session.num_prefill_tokens:
            before = session.num_prefill_tokens
            assert drafter.propose([DraftItem(drafter, session, 0, 7)]) == [[]]
            assert session.num_prefill_tokens == max(0, before - 7)
        assert draft(drafter, session, 5) == expected


def test_an_accepted_draft_is_not_run_again(drafter: CausalLmDrafter) -> None:
    with session_of(drafter, [1, 2, 3]) as session:
        tokens = draft(drafter, session, 4)
        session.commit([*tokens, 9], 8)
        # The last draft token never went through the model; the correction is the next draft's start.
        assert session.num_prefill_tokens == 1


def test_drafts_end_where_the_generation_does(drafter: CausalLmDrafter) -> None:
    with session_of(drafter, [1, 2, 3], max_length=6) as session:
        assert len(draft(drafter, session, 10)) == 3
        session.commit([4, 5], 5)
        assert len(draft(drafter, session, 10)) == 1
        session.commit([6], 6)
        assert draft(drafter, session, 10) == []


def test_drafts_end_where_the_models_context_does(drafter: CausalLmDrafter) -> None:
    assert drafter.traits.max_length == CONTEXT
    with session_of(drafter, [1] * (CONTEXT - 2), max_length=CONTEXT + 50) as session:
        assert len(draft(drafter, session, 10)) == 2
        session.commit([2, 3], CONTEXT)
        assert draft(drafter, session, 10) == []
        session.commit([4, 5], CONTEXT + 2)
        assert draft(drafter, session, 10) == []


def test_memory_is_reserved_and_given_back(drafter: CausalLmDrafter) -> None:
    sessions = [drafter.open(OpenDraft((1,), 1, CONTEXT)) for _ in range(CAPACITY // CONTEXT)]
    with pytest.raises(ResourceExhaustedError):
        drafter.open(OpenDraft((1,), 1, 1))
    drafter.close(sessions.pop())
    # A generation may outgrow the draft model's context; drafts and their memory end there.
    sessions.append(drafter.open(OpenDraft((1,), 1, 10 * CAPACITY)))
    assert [session.allocation.capacity for session in sessions] == [CONTEXT] * len(sessions)
    for session in sessions:
        drafter.close(session)


def test_tokens_the_draft_model_lacks_are_refused(drafter: CausalLmDrafter) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        drafter.open(OpenDraft((1, VOCAB_SIZE), 2, 10))
    assert caught.value.reason == "TOKEN_ID_OUT_OF_RANGE"
