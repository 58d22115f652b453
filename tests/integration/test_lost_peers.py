"""Clients, verifiers and drafters that go away, and drafters that misbehave."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem
from drafter_service.families import FAMILIES, DrafterSpec
from gateway.replicas.sessions import DRAFTING, RemoteDrafterSession
from gateway.replicas.shared_calls import SharedCalls
from specdec.client import GenerateOptions
from specdec.contract.errors import DeadlineExceededError, RequestCancelledError, UnavailableError
from specdec.v1 import drafter_pb2
from tests.raw_streams import until
from tests.refusals import PROMPT, assert_healthy, shared
from tests.systems import System, running_drafter, running_system, running_verifier
from tests.tiny_models import VOCAB_SIZE, byte_tokenizer

LONG = GenerateOptions(max_new_tokens=300, ignore_eos=True, method="none")


@shared
@pytest.mark.parametrize("method", ["none", "ngram", "model"])
async def test_a_client_that_goes_away_frees_everything(method: str, small: System) -> None:
    verifier = small.verifier.servicer.verifier
    assert verifier is not None
    options = GenerateOptions(max_new_tokens=300, ignore_eos=True, method=method)
    async with small.client.stream(PROMPT, options) as stream:
        await anext(stream)
        assert verifier.num_sessions == 1
        assert verifier.pool.free_tokens < verifier.pool.capacity_tokens
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            async for _ in stream:
                pass
    await until(lambda: verifier.num_sessions == 0, timeout_s=1)
    await assert_healthy(small)


@shared
async def test_a_deadline_ends_a_generation_and_frees_everything(small: System) -> None:
    for timeout_ms in range(100, 160, 3):  # in the middle of a draft, a verify pass, a write or a read
        with pytest.raises(DeadlineExceededError, match=r"(?i)deadline"):
            await small.client.generate(PROMPT, LONG, timeout_s=timeout_ms / 1000)
    await assert_healthy(small)


async def test_a_lost_verifier_is_unavailable_and_says_what_to_do(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        async with system.client.stream(PROMPT, LONG) as stream:
            await anext(stream)
            await system.verifier.host.stop(0)
            with pytest.raises(UnavailableError, match="was lost") as raised:
                async for _ in stream:
                    pass
        assert system.verifier_address in raised.value.message
        assert "send the request again" in raised.value.message
        assert raised.value.retry_after_s == 1.0

        with pytest.raises(UnavailableError) as raised:
            await system.client.generate(PROMPT, LONG)
        assert raised.value.retry_after_s == 1.0

        async with running_verifier(tiny_llama, listen=system.verifier_address):
            backends = system.gateway.generations.backends
            assert backends is not None
            await until(lambda: backends.verifiers.replicas[0].is_ready, timeout_s=10)
            result = await system.client.generate(PROMPT, LONG)
            assert len(result.token_ids) == 300


async def test_a_lost_drafter_costs_a_request_nothing_but_speed(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        expected = await system.client.generate(PROMPT, replace(LONG, max_new_tokens=120))
        options = replace(LONG, max_new_tokens=120, method="ngram", draft_depth=1)
        async with system.client.stream(PROMPT, options) as stream:
            await anext(stream)
            await system.drafter.host.stop(0)
            async for _ in stream:
                pass
        result = stream.result
        assert result.token_ids == expected.token_ids
        assert result.speculation.num_fallback_rounds > 0
        assert system.drafter_address in result.speculation.fallback_reason

        without = await system.client.generate(PROMPT, options)
        assert without.token_ids == expected.token_ids
        assert without.speculation.num_draft_tokens == 0

        async with running_drafter("ngram", listen=system.drafter_address):
            backends = system.gateway.generations.backends
            assert backends is not None
            await until(lambda: backends.drafters.replicas[0].is_ready, timeout_s=10)
            again = await system.client.generate(PROMPT, options)
        assert again.token_ids == expected.token_ids
        assert again.speculation.num_draft_tokens > 0


# Drafters that misbehave


class Misbehaving(Drafter):
    """A drafter whose every draft is what `draft` makes of K."""

    def __init__(self, spec: DrafterSpec, config: DrafterConfig) -> None:
        self.traits = DrafterTraits(spec.name, spec.family, config.max_draft_depth, 4)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        return [self.draft(item.draft_depth) for item in items]

    def draft(self, draft_depth: int) -> list[int]:
        raise NotImplementedError


class Raising(Misbehaving):
    def draft(self, draft_depth: int) -> list[int]:
        raise RuntimeError("out of guesses")


class TooMany(Misbehaving):
    def draft(self, draft_depth: int) -> list[int]:
        return [5] * (draft_depth + 1)


class OutsideTheVocabulary(Misbehaving):
    def draft(self, draft_depth: int) -> list[int]:
        return [VOCAB_SIZE]


class Negative(Misbehaving):
    def draft(self, draft_depth: int) -> list[int]:
        return [-1]


class Empty(Misbehaving):
    def draft(self, draft_depth: int) -> list[int]:
        return []


class RefusingToOpen(Empty):
    def open(self, request: Any) -> Any:
        raise RuntimeError("no thanks")


class Hanging(Misbehaving):
    """Hangs until the test is done."""

    released: threading.Event

    def draft(self, draft_depth: int) -> list[int]:
        assert self.released.wait(30)
        return []


@pytest.fixture
def release() -> Any:
    """Let hanging drafters go, at the latest when the test ends."""
    Hanging.released = threading.Event()
    yield Hanging.released
    Hanging.released.set()


MISBEHAVING = {
    "raising": (Raising, "out of guesses"),
    "too-many": (TooMany, "more than 4 tokens"),
    "outside": (OutsideTheVocabulary, "a token the target does not have"),
    "negative": (Negative, "defect"),
    "refusing": (RefusingToOpen, "no thanks"),
}


async def test_a_misbehaving_drafter_costs_a_request_nothing_but_speed(tiny_llama: Path) -> None:
    families = {**FAMILIES, "empty": Empty, **{name: cls for name, (cls, _) in MISBEHAVING.items()}}
    names = ("ngram", "empty", *MISBEHAVING)
    async with running_system(tiny_llama, *names, families=families) as system:
        options = {"max_new_tokens": 30, "ignore_eos": True, "draft_depth": 4}
        expected = await system.client.generate(PROMPT, GenerateOptions(method="none", **options))
        for name, (_, reason) in MISBEHAVING.items():
            result = await system.client.generate(PROMPT, GenerateOptions(method=name, **options))
            assert result.token_ids == expected.token_ids, name
            assert result.speculation.num_fallback_rounds > 0, name
            assert reason in result.speculation.fallback_reason
            assert result.speculation.num_draft_tokens == 0
        silent = await system.client.generate(PROMPT, GenerateOptions(method="empty", **options))
        assert silent.token_ids == expected.token_ids
        assert silent.speculation.num_fallback_rounds == 0, "having no guess is no failure"
        await assert_healthy(system)


@pytest.mark.parametrize("prompt_length", [20, 63, 64, 65, 150])
async def test_a_drafter_with_a_shorter_context_drafts_within_it(
    prompt_length: int, tiny_llama: Path, tmp_path: Path
) -> None:
    # GPT-2 looks positions up in a table: one past its end would be an error in the model pass.
    short = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(short).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    async with running_system(tiny_llama, "ngram", f"short=causal-lm:{tmp_path}") as system:
        prompt = [(7 * i) % 250 for i in range(prompt_length)]
        options = {"max_new_tokens": 80, "ignore_eos": True, "draft_depth": 4}
        expected = await system.client.generate(prompt, GenerateOptions(method="none", **options))
        result = await system.client.generate(prompt, GenerateOptions(method="short", **options))
        assert result.token_ids == expected.token_ids
        assert (result.speculation.num_draft_tokens > 0) == (prompt_length < 63)
        assert "short was made for texts of 64 tokens" in result.speculation.fallback_reason
        await assert_healthy(system)


async def test_a_hanging_drafter_costs_a_request_its_draft_timeout(
    tiny_llama: Path, release: threading.Event
) -> None:
    async with running_system(
        tiny_llama,
        "hanging",
        "ngram",
        families={**FAMILIES, "hanging": Hanging},
        gateway_options={"draft_timeout_s": 0.2},
    ) as system:
        options = {"max_new_tokens": 20, "ignore_eos": True, "draft_depth": 4}
        expected = await system.client.generate(PROMPT, GenerateOptions(method="none", **options))
        result = await system.client.generate(PROMPT, GenerateOptions(method="hanging", **options))
        assert result.token_ids == expected.token_ids
        assert result.speculation.num_fallback_rounds > 0
        assert "first draft takes longer" in result.speculation.fallback_reason
        assert 200 <= result.timing.total_ms < 1000
        release.set()
        await assert_healthy(system)


async def test_bytes_that_are_no_message_are_a_lost_peer_and_no_defect() -> None:
    async def garble(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await anext(requests)
        await context.write(b"\xff\xff\xff")

    class Garbling(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:  # type: ignore[type-arg]
            return grpc.stream_stream_rpc_method_handler(garble)

    server = grpc.aio.server(handlers=[Garbling()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        session = RemoteDrafterSession(
            SharedCalls(DRAFTING, lambda: channel, "garbled"), 5, drafter_pb2.DrafterInfo(), lambda _: None
        )
        with pytest.raises(UnavailableError, match="cannot be read"):
            await session.open(drafter_pb2.DraftOpen())
        await session.close()
    await server.stop(0)
