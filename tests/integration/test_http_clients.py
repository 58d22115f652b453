"""Clients that people have, against a real system: OpenAI's own, and LiteLLM where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from specdec.client import Client, GenerateOptions, Generation
from specdec.contract.sampling import SamplingParams
from specdec.local.launcher import LocalSystem
from tests.integration.gated_drafter import eventually, gated_system
from tests.systems import is_idle, running_system

TURNS: list[Any] = [{"role": "user", "content": "Name three rivers."}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 24}
EXTENSION = {"method": "ngram", "draft_depth": 4}


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> Iterator[LocalSystem]:
    """Run the three services as processes, as `specdec up` does."""
    with LocalSystem(str(tiny_llama), dtype="float32", env={"OMP_NUM_THREADS": "1"}) as system:
        yield system


@pytest.fixture(scope="module")
def expected(local: LocalSystem) -> Generation:
    """Return the answer that the same request has over gRPC."""
    options = GenerateOptions(
        sampling=SamplingParams(temperature=0.8, seed=7), max_new_tokens=24, method="ngram", draft_depth=4
    )
    with Client(local.gateway) as client:
        return client.generate(TURNS, options)


@pytest.fixture
def client(local: LocalSystem) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{local.http}/v1", api_key="none", max_retries=0) as client:
        yield client


class TestOpenAI:
    def test_a_chat(self, client: openai.OpenAI, expected: Generation) -> None:
        answer = client.chat.completions.create(
            model="default",
            messages=TURNS,
            **SAMPLED,
            extra_body=EXTENSION,
            extra_headers={"x-request-id": "sdk"},
        )
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer._request_id == "sdk"
        assert answer.usage
        assert answer.usage.completion_tokens == expected.usage.output_tokens
        details = answer.usage.completion_tokens_details
        assert details
        assert details.accepted_prediction_tokens == expected.speculation.num_accepted_tokens
        told: Any = answer.choices[0].to_dict()["specdec"]
        assert told["speculation"]["num_rounds"] == expected.speculation.num_rounds

    def test_a_stream_of_a_chat(self, client: openai.OpenAI, expected: Generation) -> None:
        with client.chat.completions.create(
            model="default",
            messages=TURNS,
            **SAMPLED,
            extra_body=EXTENSION,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            chunks = list(stream)
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(texts) == expected.text
        assert len(chunks) > 3
        assert chunks[-1].usage
        assert chunks[-1].usage.completion_tokens == expected.usage.output_tokens

    def test_completions_and_log_probabilities(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="default", prompt=[5, 6, 7], temperature=0, max_tokens=6, logprobs=2, n=2
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].logprobs
        assert len(answer.choices[0].logprobs.tokens or []) == 6
        with client.completions.create(
            model="default", prompt=[5, 6, 7], temperature=0, max_tokens=6, stream=True
        ) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
        chat = client.chat.completions.create(
            model="default", messages=TURNS, max_tokens=4, logprobs=True, top_logprobs=3
        )
        assert chat.choices[0].logprobs
        assert {len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content or []} == {3}

    def test_models(self, client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id) == model

    def test_errors(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="default", messages=TURNS, temperature=-1)
        assert (raised.value.param, raised.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as absent:
            client.chat.completions.create(model="gpt-9", messages=TURNS)
        assert absent.value.code == "model_not_found"
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(model="default", messages=TURNS, tools=[tool])


@asynccontextmanager
async def asking(address: str, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", **options) as client:
        yield client


async def test_openai_on_asyncio_and_what_it_leaves_behind(tiny_llama: Path) -> None:
    async with gated_system(tiny_llama, gateway_options={"http_listen": "127.0.0.1:0"}) as (system, gate):
        assert system.gateway.http
        async with asking(system.gateway.http.address) as client:
            options: dict[str, Any] = {"model": "default", "messages": TURNS, "max_tokens": 24}
            answer = await client.chat.completions.create(**options, seed=3)
            stream = await client.chat.completions.create(**options, seed=3, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == answer.choices[0].message.content

            gated = {"method": "gated", "draft_depth": 2, "ignore_eos": True}
            stream = await client.chat.completions.create(**options, stream=True, extra_body=gated)
            await gate.reached()
            assert system.gateway.generations.num_requests == 1
            await stream.close()
            await eventually(lambda: system.gateway.generations.num_requests == 0)
            gate.open()
            await eventually(lambda: is_idle(system))


async def test_openai_tries_again_when_it_is_told_to(tiny_llama: Path) -> None:
    options = {"http_listen": "127.0.0.1:0", "max_requests": 1, "max_waiting": 0}
    async with gated_system(tiny_llama, gateway_options=options) as (system, gate):
        assert system.gateway.http
        ask: dict[str, Any] = {"model": "default", "messages": TURNS, "max_tokens": 6}
        gated = {"method": "gated", "draft_depth": 2, "ignore_eos": True}
        async with asking(system.gateway.http.address, max_retries=0) as impatient:
            stream = await impatient.chat.completions.create(**ask, stream=True, extra_body=gated)
            await gate.reached()
            with pytest.raises(openai.RateLimitError) as raised:
                await impatient.chat.completions.create(**ask)
            assert raised.value.code == "too_many_requests"
            assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
            await stream.close()
        gate.open()


@pytest.mark.skipif(not importlib.util.find_spec("litellm"), reason="litellm is not installed")
def test_litellm(local: LocalSystem, expected: Generation) -> None:
    import litellm

    options: dict[str, Any] = {
        "model": "openai/default",
        "api_base": f"{local.http}/v1",
        "api_key": "none",
        "messages": TURNS,
        **SAMPLED,
        "extra_body": EXTENSION,
    }
    assert litellm.completion(**options).choices[0].message.content == expected.text
    chunks = list(litellm.completion(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text


async def test_padding_is_nothing_to_openai(tiny_llama: Path) -> None:
    options = {"http_listen": "127.0.0.1:0", "stream_padding": 1024}
    async with running_system(tiny_llama, "ngram", gateway_options=options) as system:
        assert system.gateway.http
        async with asking(system.gateway.http.address) as client:
            ask: dict[str, Any] = {"model": "default", "messages": TURNS, "max_tokens": 16, "temperature": 0}
            answer = await client.chat.completions.create(**ask)
            stream = await client.chat.completions.create(**ask, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == answer.choices[0].message.content
