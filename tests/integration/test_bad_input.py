"""A request that cannot be answered: an error that names the field and the limit, and nothing is lost."""

from __future__ import annotations

import math
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from specdec.client import GenerateOptions, Message
from specdec.client.wire import build_request
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError, SpecdecError
from specdec.contract.request_limits import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from specdec.contract.sampling import SamplingParams
from specdec.v1 import gateway_pb2
from specdec.v1.common_pb2 import Choices, OutputFormat
from tests.raw_streams import draft_stream, until, verify_stream
from tests.refusals import (
    CONTEXT,
    MAX_SESSIONS,
    POOL_TOKENS,
    PROMPT,
    ask,
    assert_healthy,
    assert_refusal,
    generate_request,
    sampling,
    shared,
    shown,
    small_system,
)
from tests.systems import System, running_drafter, running_system
from tests.tiny_models import VOCAB_SIZE

Chat, ChatMessage, TokenIds = gateway_pb2.Chat, gateway_pb2.ChatMessage, gateway_pb2.TokenIds
NAN, INF = math.nan, math.inf


def ids(*token_ids: int) -> dict[str, Any]:
    return {"token_ids": TokenIds(token_ids=token_ids)}


def choices(*texts: str) -> OutputFormat:
    return OutputFormat(choices=Choices(texts=texts))


SAMPLING_REFUSALS = [
    (sampling(temperature=-0.1), "temperature", "[0, 1000000]"),
    (sampling(temperature=NAN), "temperature", "[0, 1000000]"),
    (sampling(temperature=INF), "temperature", "[0, 1000000]"),
    (sampling(top_p=0.0), "top_p", "(0, 1]"),
    (sampling(top_p=1.1), "top_p", "(0, 1]"),
    (sampling(top_p=NAN), "top_p", "(0, 1]"),
    (sampling(min_p=-0.1), "min_p", "[0, 1]"),
    (sampling(min_p=1.5), "min_p", "[0, 1]"),
    (sampling(min_p=NAN), "min_p", "[0, 1]"),
    (sampling(top_k=VOCAB_SIZE + 1), "top_k", str(VOCAB_SIZE)),
    (sampling(repetition_penalty=0.0), "repetition_penalty", "(0, 1000000]"),
    (sampling(repetition_penalty=-1.0), "repetition_penalty", "(0, 1000000]"),
    (sampling(repetition_penalty=INF), "repetition_penalty", "(0, 1000000]"),
    (sampling(presence_penalty=2.5), "presence_penalty", "[-2, 2]"),
    (sampling(presence_penalty=NAN), "presence_penalty", "[-2, 2]"),
    (sampling(frequency_penalty=-2.5), "frequency_penalty", "[-2, 2]"),
    (sampling(logit_bias={5: 101.0}), "logit_bias", "[-100, 100]"),
    (sampling(logit_bias={5: NAN}), "logit_bias", "[-100, 100]"),
    (sampling(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias", str(VOCAB_SIZE)),
    (sampling(allowed_token_ids=[5, VOCAB_SIZE]), "allowed_token_ids", str(VOCAB_SIZE)),
    (sampling(allowed_token_ids=[5] * (VOCAB_SIZE + 1)), "allowed_token_ids", "entries"),
    (sampling(logit_bias=dict.fromkeys(range(4097), 1.0)), "logit_bias", "at most 4096"),
    ({"num_top_logprobs": 21}, "num_top_logprobs", "[0, 20]"),
    ({"stop_token_ids": [5, VOCAB_SIZE]}, "stop_token_ids", str(VOCAB_SIZE)),
    ({"max_new_tokens": 0}, "max_new_tokens", "at least 1"),
    ({"output_format": OutputFormat()}, "output_format", "set exactly one"),
    ({"output_format": OutputFormat(regex="(a")}, "output_format", "unclosed group"),
    ({"output_format": OutputFormat(regex="")}, "output_format.regex", "not empty"),
    ({"output_format": OutputFormat(regex="a" * 4097)}, "output_format.regex", "at most 4096"),
    ({"output_format": OutputFormat(json_schema="{")}, "output_format.json_schema", "not JSON"),
    ({"output_format": OutputFormat(json_schema="[]")}, "output_format.json_schema", "a JSON object"),
    ({"output_format": OutputFormat(json_schema="[" * 9999)}, "output_format.json_schema", "not JSON"),
    ({"output_format": OutputFormat(json_schema="{" + " " * 2**16)}, "output_format.json_schema", "65536"),
    ({"output_format": OutputFormat(json_schema='{"type": "objekt"}')}, "output_format", "objekt"),
    ({"output_format": OutputFormat(json_schema='{"not": {}, "a": NaN}')}, "output_format", "cannot be"),
    ({"output_format": OutputFormat(choices=Choices())}, "output_format.choices", "1 to 1024"),
    ({"output_format": choices(*["x"] * 1025)}, "output_format.choices", "1 to 1024"),
    ({"output_format": choices("a", "")}, "output_format.choices[1]", "not empty"),
    ({"output_format": choices("x" * 40_000, "y" * 40_000)}, "output_format.choices", "65536"),
    ({"output_format": choices("a"), "ignore_eos": True}, "ignore_eos", "leave one of them out"),
    ({"output_format": choices("a"), **sampling(allowed_token_ids=[5])}, "allowed_token_ids", "leave one"),
]
"""What gateway and verifier both refuse: (fields of the request, field at fault, part of the message)."""

GATEWAY_REFUSALS = [
    ({"text": ""}, "prompt", "empty"),
    ({"chat": Chat()}, "chat", "no messages"),
    (ids(), "prompt", "empty"),
    ({"chat": Chat(messages=[ChatMessage(role="robot", content="Hi")])}, "chat.messages.role", "assistant"),
    (ids(*[5] * CONTEXT), "prompt", str(CONTEXT)),
    ({"text": "\xe9" * 100_000}, "prompt", str(CONTEXT)),
    ({"text": "\xe9" * 1_000_000}, "prompt", "2000000 bytes"),
    ({"chat": Chat(messages=[ChatMessage(role="user", content="a" * 2**19)] * 3)}, "prompt", "1048576"),
    (ids(*[5] * (POOL_TOKENS - 7)), "max_new_tokens", str(POOL_TOKENS)),
    (ids(5, VOCAB_SIZE), "token_ids", str(VOCAB_SIZE)),
    ({"draft_depth": 65}, "draft_depth", "64"),
    ({"draft_depth": 65, "method": "ngram+model"}, "draft_depth", "64"),
    ({"draft_nodes": 65}, "draft_nodes", "64"),
    ({"draft_depth": 2**32 - 1}, "draft_depth", "64"),
    ({"draft_nodes": 2**32 - 1}, "draft_nodes", "64"),
    ({"min_draft_confidence": -0.5}, "min_draft_confidence", "from 0"),
    ({"min_draft_confidence": 1.5}, "min_draft_confidence", "to 1"),
    ({"min_draft_confidence": NAN}, "min_draft_confidence", "from 0"),
    ({"draft_depth": 0, "draft_nodes": 8}, "draft_nodes", "plain decoding"),
    ({"method": "ngram+oracle"}, "method", "Unknown method 'oracle'"),
    ({"method": "ngram+"}, "method", "up to 8 drafters"),
    ({"method": "ngram+none"}, "method", "up to 8 drafters"),
    ({"method": "ngram+ngram"}, "method", "twice"),
    ({"method": "oracle"}, "method", "none, auto, model, ngram"),
    ({"method": "\N{JAPANESE OGRE}" * 5000}, "method", "up to 8 drafters"),
    ({"method": "+".join(f"d{number}" for number in range(9))}, "method", "up to 8 drafters"),
    ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "1024"),
    (sampling(allowed_token_ids=[5] * 20_000), "allowed_token_ids", "16384"),
    ({"chat": Chat(messages=[ChatMessage(role="user")] * 4097)}, "chat.messages", "4096"),
    ({"stop_strings": [""]}, "stop_strings", "256"),
    ({"stop_strings": ["x" * 257]}, "stop_strings", "256"),
    ({"stop_strings": ["x"] * 17}, "stop_strings", "16"),
    ({"max_new_tokens": 2**31}, "max_new_tokens", "at most 8192"),
    ({"max_new_tokens": 8193}, "max_new_tokens", "at most 8192"),
    ({"cache_salt": "x" * 257}, "cache_salt", "256"),
    *SAMPLING_REFUSALS,
]

VERIFIER_REFUSALS = [
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [5] * CONTEXT}, "prompt", str(CONTEXT)),
    ({"prompt": [5] * (POOL_TOKENS - 7)}, "max_new_tokens", str(POOL_TOKENS)),
    ({"prompt": [5, 2**32 - 1]}, "committed_token_ids", str(VOCAB_SIZE)),
    ({"max_new_tokens": 2**31}, "max_new_tokens", "at most 2147483647"),
    ({"max_new_tokens": 2**32 - 1}, "max_new_tokens", "at most 2147483647"),
    ({"cache_salt": "x" * 257}, "cache_salt", "256"),
    ({"caller_key": "x" * 257}, "caller_key", "256"),
    ({"stop_token_ids": [5] * 1041}, "stop_token_ids", "1040"),
    ({"prompt_length": len(PROMPT) + 1}, "prompt_length", str(len(PROMPT))),
    *SAMPLING_REFUSALS,
]


@shared
@pytest.mark.parametrize(("fields", "field", "fragment"), GATEWAY_REFUSALS, ids=shown)
async def test_gateway_refuses(fields: dict[str, Any], field: str, fragment: str, small: System) -> None:
    with pytest.raises(SpecdecError) as raised:
        await ask(small.address, generate_request(**fields))
    assert_refusal(raised, InvalidArgumentError, field, fragment)
    await assert_healthy(small)


@shared
@pytest.mark.parametrize(("fields", "field", "fragment"), VERIFIER_REFUSALS, ids=shown)
async def test_verifier_refuses(fields: dict[str, Any], field: str, fragment: str, small: System) -> None:
    async with verify_stream(small.verifier_address) as stream:
        with pytest.raises(SpecdecError) as raised:
            await stream.open(**({"prompt": PROMPT} | fields))
    assert_refusal(raised, InvalidArgumentError, field, fragment)
    await assert_healthy(small)


@shared
async def test_a_verifier_takes_as_many_stop_tokens_as_a_gateway_may_send(small: System) -> None:
    """Those of a request, and a special token for each of its stop strings."""
    async with verify_stream(small.verifier_address) as stream:
        await stream.open(PROMPT, stop_token_ids=[255] * (MAX_STOP_TOKEN_IDS + MAX_STOP_STRINGS))
    await assert_healthy(small)


@shared
@pytest.mark.parametrize("field", ["cache_salt", "caller_key"])
async def test_drafter_refuses_long_keys(field: str, small: System) -> None:
    async with draft_stream(small.drafter_address) as stream:
        with pytest.raises(SpecdecError) as raised:
            await stream.open("ngram", PROMPT, **{field: "x" * 257})
    assert_refusal(raised, InvalidArgumentError, field, "256")
    await assert_healthy(small)


@shared
@pytest.mark.parametrize(
    ("fields", "field", "bound"),
    [
        ({"max_length": len(PROMPT) - 1}, "max_length", f"at least {len(PROMPT)}"),
        ({"max_length": 2**31}, "max_length", "at most 2147483647"),
        ({"prompt_length": len(PROMPT) + 1}, "prompt_length", f"at most {len(PROMPT)}"),
        ({"min_draft_confidence": 1.5}, "min_draft_confidence", "to 1"),
    ],
)
async def test_drafter_names_the_bound_of_a_number(
    fields: dict[str, Any], field: str, bound: str, small: System
) -> None:
    async with draft_stream(small.drafter_address) as stream:
        with pytest.raises(SpecdecError) as raised:
            await stream.open("ngram", PROMPT, **fields)
    assert_refusal(raised, InvalidArgumentError, field, bound)
    await assert_healthy(small)


@shared
async def test_gateway_refuses_a_request_without_a_prompt(small: System) -> None:
    with pytest.raises(InvalidArgumentError, match="set chat, text or token_ids") as raised:
        await ask(small.address, gateway_pb2.GenerateRequest(max_new_tokens=4))
    assert raised.value.field == "prompt"
    await assert_healthy(small)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([], {}, "prompt"),
        (b"bytes", {}, "prompt"),
        ([-1], {}, "prompt"),
        ([2**32], {}, "prompt"),
        ("\udcff", {}, "prompt"),
        ([Message("user", "Hi")], {"raw": True}, "raw"),
        (PROMPT, {"draft_depth": -1}, "draft_depth"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens"),
        (PROMPT, {"stop_token_ids": (-1,)}, "stop_token_ids"),
        (PROMPT, {"num_top_logprobs": -1}, "num_top_logprobs"),
        (PROMPT, {"stop": "one string"}, "stop"),
        (PROMPT, {"sampling": SamplingParams(top_k=-1)}, "top_k"),
        (PROMPT, {"sampling": SamplingParams(seed=-1)}, "seed"),
        (PROMPT, {"sampling": SamplingParams(seed=2**64)}, "seed"),
        (PROMPT, {"sampling": SamplingParams(temperature=NAN)}, "temperature"),
        (PROMPT, {"sampling": SamplingParams(logit_bias={-1: 1.0})}, "logit_bias"),
        (PROMPT, {"sampling": SamplingParams(allowed_token_ids=(-1,))}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_sdk_refuses_what_the_wire_cannot_carry(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        build_request(prompt, GenerateOptions(**options))
    assert raised.value.field == field, raised.value
    assert field in raised.value.message


# Room


@pytest.mark.parametrize(
    ("num_streams", "num_tokens", "reason"),
    [(3, POOL_TOKENS // 3, "KV_POOL_FULL"), (MAX_SESSIONS, 16, "NO_SESSION_SLOT")],
)
async def test_a_full_verifier_says_when_to_retry(
    num_streams: int, num_tokens: int, reason: str, tiny_llama: Path
) -> None:
    async with AsyncExitStack() as stack:
        small = await stack.enter_async_context(small_system(tiny_llama, gateway_options={"max_waiting": 0}))
        sessions = await stack.enter_async_context(AsyncExitStack())
        for _ in range(num_streams):
            stream = await sessions.enter_async_context(verify_stream(small.verifier_address))
            await stream.open(PROMPT, max_new_tokens=num_tokens - len(PROMPT))
        # Each session has one token, and so many are left: at this speed, the next ends no sooner than that.
        opened_at, num_left = time.monotonic(), num_tokens - len(PROMPT) - 1
        await until(lambda: (time.monotonic() - opened_at) * num_left > 2)
        with pytest.raises(ResourceExhaustedError, match="try again") as raised:
            await ask(small.address, generate_request())
        assert raised.value.retry_after_s is not None
        assert 2 < raised.value.retry_after_s <= 60
        assert raised.value.reason == reason
        await sessions.aclose()
        await assert_healthy(small)


async def test_a_full_gateway_says_when_to_retry(tiny_llama: Path) -> None:
    async with (
        running_system(tiny_llama, gateway_options={"max_requests": 1, "max_waiting": 0}) as system,
        system.client.stream(PROMPT, GenerateOptions(max_new_tokens=400, ignore_eos=True)) as stream,
    ):
        await anext(stream)
        with pytest.raises(ResourceExhaustedError, match="try again") as raised:
            await ask(system.address, generate_request())
        assert raised.value.retry_after_s is not None
        assert 1 <= raised.value.retry_after_s <= 60
        async for _ in stream:
            pass
        assert stream.result.usage.output_tokens == 400
        await assert_healthy(system)


@pytest.mark.parametrize(
    ("drafter", "max_sessions", "reason"), [("ngram", 2, "NO_SESSION_SLOT"), ("model", 8, "KV_POOL_FULL")]
)
async def test_a_full_drafter_says_when_to_retry(
    drafter: str, max_sessions: int, reason: str, tiny_llama: Path
) -> None:
    options = {"max_sessions": max_sessions, "kv_cache_mib": 0.25}
    async with (
        running_drafter("ngram", f"model=causal-lm:{tiny_llama}", **options) as (address, server),
        AsyncExitStack() as stack,
    ):
        assert server.servicer.host
        pool = server.servicer.host.drafters["model"].kv_pool
        assert pool
        max_length = pool.capacity_tokens // 2
        streams = [await stack.enter_async_context(draft_stream(address)) for _ in range(3)]
        for stream in streams[:-1]:
            await stream.open(drafter, PROMPT, max_length=max_length)
        with pytest.raises(ResourceExhaustedError) as raised:
            await streams[-1].open(drafter, PROMPT, max_length=max_length)
        assert (raised.value.reason, raised.value.retry_after_s) == (reason, 1), "nobody knows yet"
        opened_at = time.monotonic()
        for stream in streams[:-1]:
            await stream.round([5], len(PROMPT) + 1)
        # Each has one token, and so many are left: at this speed, the next ends no sooner than that.
        num_left = max_length - len(PROMPT) - 1
        await until(lambda: (time.monotonic() - opened_at) * num_left > 2)
        stream = await stack.enter_async_context(draft_stream(address))
        with pytest.raises(ResourceExhaustedError) as raised:
            await stream.open(drafter, PROMPT, max_length=max_length)
        assert raised.value.reason == reason
        assert raised.value.retry_after_s is not None
        assert 2 < raised.value.retry_after_s <= 60


async def test_a_full_drafter_costs_a_request_nothing_but_speed(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, drafter_options={"max_sessions": 1}) as system:
        expected = await ask(system.address, generate_request(method="none"))
        async with draft_stream(system.drafter_address) as stream:
            await stream.open("ngram", PROMPT)
            result = await system.client.generate(PROMPT, GenerateOptions(max_new_tokens=8))
        assert list(result.token_ids) == expected
        assert result.speculation.num_fallback_rounds > 0
        assert "session slots" in result.speculation.fallback_reason
        await assert_healthy(system)


@shared
async def test_a_generation_longer_than_the_pool_is_refused_whatever_drafts(small: System) -> None:
    prompt = [i % 250 for i in range(100)]
    options = GenerateOptions(max_new_tokens=8_000, ignore_eos=True, method="model", draft_depth=4)
    with pytest.raises(InvalidArgumentError, match=str(POOL_TOKENS)):
        await small.client.generate(prompt, options)
    await assert_healthy(small)


async def test_max_new_tokens_beyond_the_context_is_cut_and_drafted(tiny_llama: Path) -> None:
    prompt = [i % 250 for i in range(CONTEXT - 20)]
    async with running_system(tiny_llama, f"model=causal-lm:{tiny_llama}") as system:
        options = GenerateOptions(max_new_tokens=8_000, ignore_eos=True, method="model", draft_depth=4)
        result = await system.client.generate(prompt, options)
        assert len(result.token_ids) == 20
        assert result.finish_reason == "length"
        assert result.speculation.fallback_reason == ""
        assert result.speculation.num_accepted_tokens == result.speculation.num_draft_tokens > 0
