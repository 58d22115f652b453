"""Requests that wait in the gateway for room, over real servers: all get their turn, and nothing leaks."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.contract.sampling import SamplingParams
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import Gate, eventually, gated_system
from tests.raw_streams import verify_stream
from tests.systems import (
    System,
    is_idle,
    running_drafter,
    running_gateway,
    running_system,
    running_verifier,
)
from tests.unit.test_stats import points

PROMPT = [5, 6, 7]
PLAIN = GenerateOptions(method="none", max_new_tokens=29, ignore_eos=True)
GATED = replace(PLAIN, method="gated")
TWO_SLOTS: dict[str, Any] = {"max_sessions": 2}
TWO_SESSIONS_KV: dict[str, Any] = {"kv_cache_mib": 0.03125}
"""Room for 64 tokens, prompts included."""


async def nothing_is_held(system: System) -> bool:
    """Return whether no service holds a session, a place or memory."""
    servicer = system.gateway.generations
    return await is_idle(system) and (servicer.num_requests, servicer.num_waiting) == (0, 0)


def waiting(system: System, number: int) -> Any:
    """Return the condition that so many requests wait."""
    return lambda: system.gateway.generations.num_waiting == number


def ended_requests(reader: InMemoryMetricReader) -> Counter[tuple[str, str]]:
    """Return how many requests ended, by method and outcome."""
    counted: Counter[tuple[str, str]] = Counter()
    for point in points(reader, "specdec.requests"):
        counted[point.attributes["method"], point.attributes["outcome"]] += point.value
    return counted


@pytest.mark.parametrize("room", [TWO_SLOTS, TWO_SESSIONS_KV], ids=["slots", "pool"])
async def test_ten_at_once_are_all_answered_as_they_are_alone(room: dict[str, Any], tiny_llama: Path) -> None:
    options = [
        replace(PLAIN, method=method, sampling=sampling)
        for sampling in (SamplingParams(), SamplingParams(temperature=0.9, seed=3))
        for method in ("none", "none", "ngram", "ngram", "none")
    ]
    prompts = [[5 + number, 6, 7] for number in range(10)]
    async with running_system(tiny_llama, "ngram", verifier_options=room) as system:

        async def ask(number: int) -> Generation:
            return await system.client.generate(prompts[number], options[number])

        alone = [await ask(number) for number in range(10)]
        together = await asyncio.gather(*map(ask, range(10)))
        assert [each.token_ids for each in together] == [each.token_ids for each in alone]
        assert all(each.timing.waiting_ms < 1 for each in alone)
        waited = [each.timing for each in together if each.timing.waiting_ms > 1]
        assert len(waited) >= 6
        assert all(timing.waiting_ms < timing.ttft_ms < timing.total_ms for timing in waited)
        await eventually(lambda: nothing_is_held(system))


async def test_a_full_queue_refuses_and_says_when_to_retry(tiny_llama: Path) -> None:
    async with gated_system(
        tiny_llama, verifier_options={"max_sessions": 1}, gateway_options={"max_waiting": 2}
    ) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        queued = [asyncio.create_task(system.client.generate(PROMPT, PLAIN)) for _ in range(2)]
        await eventually(waiting(system, 2))
        with pytest.raises(ResourceExhaustedError) as raised:
            await system.client.generate(PROMPT, PLAIN)
        assert raised.value.reason == "TOO_MANY_REQUESTS"
        assert raised.value.retry_after_s
        gate.open()
        answers = await asyncio.gather(running, *queued)
        assert len({answer.token_ids for answer in answers}) == 1
        await eventually(lambda: nothing_is_held(system))


@pytest.mark.parametrize("place", ["gateway", "verifier"])
async def test_a_deadline_that_passes_in_the_queue_ends_the_wait(place: str, tiny_llama: Path) -> None:
    reader = InMemoryMetricReader()
    options: dict[str, Any] = (
        {"gateway_options": {"max_requests": 1}}
        if place == "gateway"
        else {"verifier_options": {"max_sessions": 1}}
    )
    async with gated_system(
        tiny_llama, telemetry=make_telemetry("test", metric_reader=reader), **options
    ) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        with pytest.raises(DeadlineExceededError):
            await system.client.generate(PROMPT, PLAIN, timeout_s=0.4)
        servicer = system.gateway.generations
        await eventually(lambda: (servicer.num_requests, servicer.num_waiting) == (1, 0))
        gate.open()
        assert (await running).usage.output_tokens == 29
        await eventually(lambda: nothing_is_held(system))
        # It has a method though its turn may never have come: what it asks for was settled at once.
        ended = {
            method
            for method, outcome in ended_requests(reader)
            if outcome in ("deadline_exceeded", "cancelled")
        }
        assert ended == {"none"}


async def test_who_leaves_the_queue_is_forgotten_at_once(tiny_llama: Path) -> None:
    async with gated_system(tiny_llama, verifier_options={"max_sessions": 1}) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        queued = [asyncio.create_task(system.client.generate(PROMPT, PLAIN)) for _ in range(3)]
        await eventually(waiting(system, 3))
        queued[0].cancel()
        queued[2].cancel()
        await eventually(waiting(system, 1))
        gate.open()
        assert (await running).token_ids == (await queued[1]).token_ids
        await eventually(lambda: nothing_is_held(system))


@pytest.mark.parametrize("place", ["gateway", "verifier"])
async def test_a_caller_with_one_request_waits_for_one_of_a_caller_with_many(
    place: str, tiny_llama: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("".join(_entry(name) for name in ("many", "one")))
    gate = Gate()
    order: list[str] = []
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        slots = 1 if place == "verifier" else 16
        verifier_at, verifier = await enter(running_verifier(tiny_llama, max_sessions=slots))
        drafter_at, _ = await enter(running_drafter("gated", families=gate.families))
        stack.callback(gate.open)
        address, gateway = await enter(
            running_gateway(
                tiny_llama,
                verifier=verifier_at,
                drafter=drafter_at,
                auth_tokens=str(tokens),
                draft_timeout_s=20.0,
                **({"max_requests": 1} if place == "gateway" else {}),
            )
        )
        clients = {
            name: await enter(AsyncClient(address, token=name, timeout_s=60)) for name in ("many", "one")
        }

        async def ask(name: str, options: GenerateOptions = PLAIN) -> None:
            await clients[name].generate(PROMPT, options)
            order.append(name)

        async def is_offered() -> bool:
            return "gated" in (await clients["one"].info()).methods

        await eventually(is_offered)
        tasks = [asyncio.create_task(ask("many", GATED))]
        await gate.reached()
        for number in range(1, 9):
            tasks.append(asyncio.create_task(ask("many")))
            await eventually(lambda number=number: gateway.generations.num_waiting == number)
        tasks.append(asyncio.create_task(ask("one")))
        await eventually(lambda: gateway.generations.num_waiting == 9)
        gate.open()
        await asyncio.gather(*tasks)
        # The one that ran, and one or two whose turn had come before.
        assert order.index("one") <= 3, order
        held = verifier.servicer.verifier
        await eventually(lambda: held.num_sessions == gateway.generations.num_requests == 0)
        assert gateway.generations.num_waiting == 0


def _entry(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f'[[tokens]]\nname = "{name}"\nsha256 = "{digest}"\n'


async def test_room_that_others_leave_is_found_and_the_wait_is_no_part_of_the_running_time(
    tiny_llama: Path,
) -> None:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(spans), metric_reader=reader)
    async with running_system(
        tiny_llama,
        "ngram",
        telemetry=telemetry,
        verifier_options={"max_sessions": 1},
        gateway_options={"max_request_s": 2.0},
    ) as system:
        async with verify_stream(system.verifier_address) as other:
            await other.open(PROMPT)
            begun = time.monotonic()
            asked = asyncio.create_task(system.client.generate(PROMPT, PLAIN))
            await eventually(waiting(system, 1))
            (gauge,) = points(reader, "specdec.gateway.waiting_requests")
            assert gauge.value == 1
            await eventually(lambda: time.monotonic() - begun > 2.5)
            assert not asked.done()
        answer = await asked
        assert answer.usage.output_tokens == 29
        assert 2400 < answer.timing.waiting_ms < answer.timing.ttft_ms
        await eventually(lambda: nothing_is_held(system))
    (wait,) = points(reader, "specdec.gateway.waiting_duration")
    (span,) = (span for span in spans.get_finished_spans() if span.name == "specdec.generate")
    assert span.attributes
    waited_ns = span.attributes["specdec.waiting_ns"]
    assert waited_ns == pytest.approx(answer.timing.waiting_ms * 1e6)
    assert (wait.count, wait.sum) == (1, pytest.approx(answer.timing.waiting_ms / 1e3))
    assert ended_requests(reader) == {("none", "length"): 1}


async def test_who_waits_for_too_long_is_told(tiny_llama: Path) -> None:
    async with (
        running_system(
            tiny_llama, verifier_options={"max_sessions": 1}, gateway_options={"max_wait_s": 0.3}
        ) as system,
        verify_stream(system.verifier_address) as other,
    ):
        await other.open(PROMPT)
        with pytest.raises(DeadlineExceededError, match="waited") as raised:
            await system.client.generate(PROMPT, PLAIN)
        assert raised.value.reason == "WAITED_TOO_LONG"
        assert (system.gateway.generations.num_requests, system.gateway.generations.num_waiting) == (0, 0)


async def test_what_never_fits_is_refused_and_what_fits_one_verifier_waits_for_it(tiny_llama: Path) -> None:
    large = replace(PLAIN, max_new_tokens=100)
    async with (
        running_verifier(tiny_llama, **TWO_SESSIONS_KV) as (small_at, _),
        running_verifier(tiny_llama, max_sessions=1) as (large_at, _),
        running_gateway(tiny_llama, verifier=f"{small_at},{large_at}") as (address, gateway),
        AsyncClient(address, timeout_s=60) as client,
    ):
        assert gateway.generations.backends
        verifiers = gateway.generations.backends.verifiers
        await eventually(lambda: verifiers.num_ready == 2)
        async with verify_stream(large_at) as other:
            await other.open(PROMPT)
            asked = asyncio.create_task(client.generate(PROMPT, large))
            await eventually(lambda: gateway.generations.num_waiting == 1)
        assert (await asked).usage.output_tokens == 100
        await eventually(lambda: not any(replica.num_sessions for replica in verifiers.replicas))
    async with running_system(tiny_llama, verifier_options=TWO_SESSIONS_KV) as system:
        with pytest.raises(InvalidArgumentError) as raised:
            await system.client.generate(PROMPT, large)
        assert raised.value.reason == "EXCEEDS_KV_POOL"
        await eventually(lambda: nothing_is_held(system))


async def test_who_waits_outlives_a_restart_of_the_verifier(tiny_llama: Path) -> None:
    async with AsyncExitStack() as first:
        verifier_at, _ = await first.enter_async_context(running_verifier(tiny_llama, max_sessions=1))
        async with (
            running_gateway(tiny_llama, verifier=verifier_at, failover_wait_s=20.0) as (address, gateway),
            AsyncClient(address, timeout_s=60) as client,
        ):
            assert gateway.generations.backends
            verifiers = gateway.generations.backends.verifiers
            other = await first.enter_async_context(verify_stream(verifier_at))
            await other.open(PROMPT)
            asked = [asyncio.create_task(client.generate(PROMPT, PLAIN)) for _ in range(3)]
            await eventually(lambda: gateway.generations.num_waiting == 3)
            await first.aclose()
            await eventually(lambda: not verifiers.num_ready)
            await eventually(lambda: gateway.generations.num_requests > 0)
            async with running_verifier(tiny_llama, max_sessions=1, listen=verifier_at) as (_, server):
                answers = await asyncio.gather(*asked)
                assert {answer.usage.output_tokens for answer in answers} == {29}
                verifier = server.servicer.verifier
                assert verifier
                await eventually(lambda: verifier.num_sessions == gateway.generations.num_requests == 0)
                assert gateway.generations.num_waiting == 0


async def test_large_requests_that_wait_are_limited_by_their_bytes(tiny_llama: Path) -> None:
    limits = {"max_requests": 1, "max_waiting_bytes": 700}
    async with gated_system(tiny_llama, gateway_options=limits) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        large = [5] * 400
        waits = asyncio.create_task(system.client.generate(large, PLAIN))
        await eventually(waiting(system, 1))
        with pytest.raises(ResourceExhaustedError) as raised:
            await system.client.generate(large, PLAIN)
        assert raised.value.reason == "TOO_MANY_REQUESTS"
        assert raised.value.retry_after_s
        small = asyncio.create_task(system.client.generate(PROMPT, PLAIN))
        await eventually(waiting(system, 2))
        gate.open()
        answers = await asyncio.gather(running, waits, small)
        assert [answer.usage.output_tokens for answer in answers] == [29] * 3
        await eventually(lambda: nothing_is_held(system))


async def test_a_gateway_that_drains_sends_away_who_waits_and_ends_what_runs(tiny_llama: Path) -> None:
    async with gated_system(tiny_llama, verifier_options={"max_sessions": 1}) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        queued = [asyncio.create_task(system.client.generate(PROMPT, PLAIN)) for _ in range(3)]
        await eventually(waiting(system, 3))
        draining = asyncio.create_task(system.gateway.host.stop(grace_s=30))
        for request in queued:
            with pytest.raises(UnavailableError) as raised:
                await request
            assert raised.value.reason == "DRAINING"
            assert raised.value.retry_after_s
        assert not running.done()
        gate.open()
        assert (await running).usage.output_tokens == 29
        await draining


async def test_what_is_wrong_with_a_request_is_said_before_it_waits(tiny_llama: Path) -> None:
    async with gated_system(tiny_llama, verifier_options={"max_sessions": 1}) as (system, gate):
        running = asyncio.create_task(system.client.generate(PROMPT, GATED))
        await gate.reached()
        waits = asyncio.create_task(system.client.generate(PROMPT, PLAIN))
        await eventually(waiting(system, 1))
        with pytest.raises(InvalidArgumentError, match="oracle"):
            await system.client.generate(PROMPT, replace(PLAIN, method="oracle"))
        gate.open()
        await asyncio.gather(running, waits)
        await eventually(lambda: nothing_is_held(system))
