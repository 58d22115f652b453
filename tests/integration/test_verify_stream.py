"""A session on the wire: lengths, rounds, chunked prefill, resumption, log probabilities and endings."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from specdec.contract.sampling import SamplingParams
from specdec.runtime.kv_slots import KvAllocation
from specdec.v1 import verifier_pb2
from tests.raw_streams import output_of, run_session, tokens_of, until, verify_stream
from tests.systems import running_verifier
from tests.tiny_models import EOS, VOCAB_SIZE

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
LONG_PROMPT = [(17 * i) % 250 for i in range(203)]
PENALISED = SamplingParams(temperature=0.9, presence_penalty=1.5, frequency_penalty=0.8, seed=5)
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    SamplingParams(presence_penalty=2.0, frequency_penalty=1.0),
    PENALISED,
    SamplingParams(temperature=1.2, repetition_penalty=1.5, min_p=0.01, seed=2**64 - 1),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(tiny_llama: Path) -> AsyncIterator[str]:
    """Run a verifier and yield its address; check at the end that its pool is whole and no session left."""
    num_allocations = sum(type(thing) is KvAllocation for thing in gc.get_objects())
    async with running_verifier(tiny_llama) as (address, server):
        yield address
        verifier = server.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.num_sessions == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        gc.collect()
        # The last pass is kept until the next one.
        assert sum(type(thing) is KvAllocation for thing in gc.get_objects()) <= num_allocations + 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_any_draft_commits_the_same_tokens(sampling: SamplingParams, address: str) -> None:
    options = {"max_new_tokens": 40, "ignore_eos": True, "sampling": sampling.to_proto()}
    plain = await output_of(address, PROMPT, **options)
    assert len(plain) == 40
    rng = random.Random(str(sampling))
    async with verify_stream(address) as stream:
        result = await stream.open(PROMPT, **options)
        num_accepted = 0
        while not result.finish_reason:
            done = len(stream.token_ids) - len(PROMPT)
            num_right = rng.randrange(5)
            right = plain[done : done + num_right]
            wrong = [(token + 1) % VOCAB_SIZE for token in plain[done + num_right : done + num_right + 1]]
            draft = [*right, *wrong, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(3)))]
            result = await stream.round(draft)
            num_accepted += result.num_accepted_tokens
            # All of the right part, none of the wrong one, unless the room ends first.
            assert result.num_accepted_tokens == min(len(right), len(plain) - done - 1)
        assert stream.token_ids[len(PROMPT) :] == plain
        assert num_accepted > 0


@pytest.mark.parametrize("chunk", [1, 7, 16, 202, 203])
async def test_a_chunked_prefill_equals_a_whole_one(chunk: int, tiny_llama: Path, address: str) -> None:
    options = {"max_new_tokens": 12, "ignore_eos": True, "num_top_logprobs": 3}
    whole = await run_session(address, LONG_PROMPT, **options)
    async with running_verifier(tiny_llama, prefill_chunk_tokens=chunk, max_batch_tokens=8) as (other, _):
        chunked = await run_session(other, LONG_PROMPT, **options)
    assert [r.bonus_token_id for r in chunked] == [r.bonus_token_id for r in whole]
    for ours, theirs in zip(chunked, whole, strict=True):
        assert ours.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=1e-4)


@pytest.mark.parametrize("num_before", [1, 9, 23])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_a_resumed_session_goes_on_as_if_it_had_not_stopped(
    sampling: SamplingParams, num_before: int, address: str
) -> None:
    options = {"ignore_eos": True, "sampling": sampling.to_proto()}
    whole = await output_of(address, PROMPT, max_new_tokens=24, **options)
    rest = await output_of(
        address,
        [*PROMPT, *whole[:num_before]],
        prompt_length=len(PROMPT),
        max_new_tokens=24 - num_before,
        **options,
    )
    assert [*whole[:num_before], *rest] == whole


async def test_resumed_tokens_count_as_output_and_prompt_tokens_do_not(address: str) -> None:
    options = {"ignore_eos": True, "sampling": replace(PENALISED, temperature=0.0).to_proto()}
    whole = await output_of(address, PROMPT, max_new_tokens=24, **options)
    as_prompt = await output_of(address, [*PROMPT, *whole[:12]], max_new_tokens=12, **options)
    assert as_prompt != whole[12:], "the penalties are too weak to show the difference"


async def test_logprobs_are_the_unprocessed_log_softmax(tiny_llama: Path, address: str) -> None:
    sampling = SamplingParams(temperature=1.5, top_k=9, presence_penalty=1.0, logit_bias={3: 2.0}, seed=8)
    options = {"max_new_tokens": 24, "ignore_eos": True, "sampling": sampling.to_proto()}
    output = await output_of(address, PROMPT, **options)
    drafts = [output[1:4], [*output[5:7], (output[7] + 1) % VOCAB_SIZE]]
    results = await run_session(address, PROMPT, drafts=drafts, num_top_logprobs=20, **options)
    assert tokens_of(results, drafts) == output
    entries = [entry for result in results for entry in result.logprobs]
    assert [len(r.logprobs) for r in results] == [r.num_accepted_tokens + 1 for r in results]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *output]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    best, best_ids = expected.topk(20)
    for row, (token_id, entry) in enumerate(zip(output, entries, strict=True)):
        assert entry.logprob == pytest.approx(expected[row, token_id].item(), abs=1e-3)
        assert [top.token_id for top in entry.top] == best_ids[row].tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(best[row].tolist(), abs=1e-3)
        assert sum(math.exp(top.logprob) for top in entry.top) <= 1 + 1e-5
        own = [top.logprob for top in entry.top if top.token_id == token_id]
        assert own in ([], [entry.logprob])


async def test_logprobs_of_the_token_alone_and_none_at_all(address: str) -> None:
    for result in await run_session(address, PROMPT, num_top_logprobs=0):
        assert [len(entry.top) for entry in result.logprobs] == [0]
        assert result.logprobs[0].logprob < 0
    for result in await run_session(address, PROMPT):
        assert not result.logprobs


@pytest.mark.parametrize("is_drafted", [False, True], ids=["bonus", "drafted"])
async def test_a_stop_token_ends_the_session_and_what_follows_is_dropped(
    is_drafted: bool, address: str
) -> None:
    options = {"max_new_tokens": 30, "ignore_eos": True}
    plain = await output_of(address, PROMPT, **options)
    stop = next(token for token in plain[6:] if token not in plain[:6])
    end = plain.index(stop) + 1
    drafts = [plain[1 : end + 3]] if is_drafted else []
    results = await run_session(address, PROMPT, drafts=drafts, stop_token_ids=[stop, 3], **options)
    assert tokens_of(results, drafts) == plain[:end]
    assert results[-1].finish_reason == verifier_pb2.FINISH_REASON_STOP_TOKEN
    assert results[-1].bonus_token_id == stop


async def test_the_models_own_end_token_ends_the_session_unless_ignored(address: str) -> None:
    bias = SamplingParams(logit_bias={EOS: 100.0}).to_proto()
    ended = await run_session(address, PROMPT, max_new_tokens=6, sampling=bias)
    assert [r.bonus_token_id for r in ended] == [EOS]
    assert ended[0].finish_reason == verifier_pb2.FINISH_REASON_STOP_TOKEN
    ignoring = await run_session(address, PROMPT, max_new_tokens=6, sampling=bias, ignore_eos=True)
    assert [r.bonus_token_id for r in ignoring] == [EOS] * 6
    assert ignoring[-1].finish_reason == verifier_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 9])
async def test_a_draft_longer_than_what_remains_is_trimmed(max_new_tokens: int, address: str) -> None:
    plain = await output_of(address, PROMPT, max_new_tokens=20, ignore_eos=True)
    drafts = [plain[1:20]]
    results = await run_session(
        address, PROMPT, drafts=drafts, max_new_tokens=max_new_tokens, ignore_eos=True
    )
    assert tokens_of(results, drafts) == plain[:max_new_tokens]
    assert len(results) == min(2, max_new_tokens)
    assert results[-1].finish_reason == verifier_pb2.FINISH_REASON_LENGTH


async def test_the_models_context_ends_a_session_like_max_new_tokens(address: str) -> None:
    prompt = [i % 250 for i in range(508)]
    results = await run_session(address, prompt, max_new_tokens=100, ignore_eos=True)
    assert len(results) == 512 - 508
    assert results[-1].finish_reason == verifier_pb2.FINISH_REASON_LENGTH


async def test_a_stream_that_ends_before_it_is_opened_is_no_error(address: str) -> None:
    async with verify_stream(address) as stream:
        await stream.call.done_writing()
        assert await stream.call.code() is grpc.StatusCode.OK
