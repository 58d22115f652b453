"""Requests whose maxima do not fit the KV pool together: all are answered as they are alone."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.contract.errors import DeadlineExceededError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import StateStorage, TargetStateSpec
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import eventually
from tests.integration.test_preemption import BLOCK_MIB, finish
from tests.integration.test_waiting import nothing_is_held
from tests.raw_streams import verify_stream
from tests.state_probe import StateProbe
from tests.systems import System, running_gateway, running_system, running_verifier
from tests.unit.test_stats import points

NUM_REQUESTS = 5
LENGTH = 4 * BLOCK_TOKENS
"""Tokens of each text at its end: four blocks."""
PROMPTS = [[5 + number, 6, 7, 5 + number, 6] for number in range(NUM_REQUESTS)]
OPTIONS = GenerateOptions(method="none", max_new_tokens=LENGTH - 5, ignore_eos=True, draft_depth=3)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, presence_penalty=0.7, frequency_penalty=0.5, seed=11)


async def answers(system: System, options: GenerateOptions) -> list[Generation]:
    """Return the answers to all prompts, asked at once."""
    return await asyncio.gather(*(system.client.generate(prompt, options) for prompt in PROMPTS))


async def alone(model: Path, options: GenerateOptions) -> list[tuple[int, ...]]:
    """Return the tokens of each answer where it has all the room it may want, without drafts."""
    async with running_system(model, "ngram") as system:
        plain = replace(options, method="none")
        return [(await system.client.generate(prompt, plain)).token_ids for prompt in PROMPTS]


def total(reader: InMemoryMetricReader, name: str) -> float:
    return sum(point.value for point in points(reader, name))


@pytest.mark.parametrize(
    ("method", "sampling", "num_blocks"),
    [("none", GREEDY, 4), ("none", SAMPLED, 9), ("ngram", GREEDY, 9), ("ngram", SAMPLED, 4)],
)
async def test_a_pool_too_small_for_all_serves_all_as_they_are_alone(
    method: str, sampling: SamplingParams, num_blocks: int, tiny_llama: Path
) -> None:
    reader, spans = InMemoryMetricReader(), InMemorySpanExporter()
    telemetry = make_telemetry("test", metric_reader=reader, span_processor=SimpleSpanProcessor(spans))
    options = replace(OPTIONS, method=method, sampling=sampling)
    expected = await alone(tiny_llama, options)
    async with running_system(
        tiny_llama, "ngram", telemetry=telemetry, verifier_options={"kv_cache_mib": num_blocks * BLOCK_MIB}
    ) as system:
        found = await answers(system, options)
        assert [answer.token_ids for answer in found] == expected
        assert [answer.num_failovers for answer in found] == [0] * NUM_REQUESTS
        num_preemptions = total(reader, "specdec.preemptions")
        assert num_preemptions > 0
        assert total(reader, "specdec.verifier.preempted_sessions") == num_preemptions
        assert not points(reader, "specdec.failovers")
        told = [
            span.attributes.get("specdec.num_preemptions", 0)
            for span in spans.get_finished_spans()
            if span.name == "specdec.generate" and span.attributes
        ]
        assert sum(told) == num_preemptions
        assert all(answer.timing.waiting_ms < answer.timing.total_ms for answer in found)
        await eventually(lambda: nothing_is_held(system))
        # Nobody was blamed: the verifier answers as before.
        (replica,) = system.gateway.generations.backends.verifiers.replicas
        assert replica.is_ready
        assert not replica.rests
        again = await system.client.generate(PROMPTS[0], options)
        assert again.token_ids == expected[0]
        assert again.timing.waiting_ms < 1


@pytest.mark.parametrize(
    ("storage", "sampling"), [(StateStorage.SHARED_MEMORY, GREEDY), (StateStorage.STREAM, SAMPLED)]
)
async def test_drafters_read_the_state_of_sessions_that_grow_and_of_those_after_a_preemption(
    storage: StateStorage, sampling: SamplingParams, tiny_llama: Path, tmp_path: Path
) -> None:
    probe = StateProbe(TargetStateSpec((0, 3), True, (1,)))
    mode = "stream" if storage is StateStorage.STREAM else "auto"
    options = replace(OPTIONS, method="probe", sampling=sampling)
    expected = await alone(tiny_llama, options)
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options={"kv_cache_mib": 6 * BLOCK_MIB, "shared_dir": str(tmp_path)},
        drafter_options={"target_state": mode, "shared_dir": str(tmp_path)},
    ) as system:
        found = await answers(system, options)
        assert [answer.token_ids for answer in found] == expected
        assert sum(answer.num_failovers for answer in found) == 0
        assert sum(answer.speculation.num_accepted_tokens for answer in found) > 0
        assert {one for session in probe.sessions for one in session.storages} == {storage}
        assert len(probe.sessions) > NUM_REQUESTS, "it attaches to the sessions after a preemption"
        lengths = [reading.length for session in probe.sessions for reading in session.readings]
        assert max(lengths) > 3 * BLOCK_TOKENS
        # A round or two without the drafter where its session ended, no more.
        for answer in found:
            assert answer.speculation.num_fallback_rounds < answer.speculation.num_rounds / 4
        await eventually(lambda: nothing_is_held(system))


async def test_a_text_that_grows_past_its_first_blocks_is_read_in_full(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Whatever is read through a handle that was extended equals what another run streams."""
    readings = {}
    for mode in ("handle", "stream"):
        probe = StateProbe(TargetStateSpec((0, 3), True, (1,)))
        async with running_system(
            tiny_llama,
            "probe",
            families=probe.families,
            verifier_options={"shared_dir": str(tmp_path)},
            drafter_options={"target_state": mode, "shared_dir": str(tmp_path)},
        ) as system:
            await system.client.generate(PROMPTS[0], replace(OPTIONS, method="probe"))
        (session,) = probe.sessions
        readings[mode] = session.readings[-1]
    by_handle, streamed = readings["handle"], readings["stream"]
    assert by_handle.length == streamed.length > 3 * BLOCK_TOKENS
    assert by_handle.tensors.keys() == streamed.tensors.keys()
    for name, tensor in by_handle.tensors.items():
        assert tensor.equal(streamed.tensors[name]), name


async def test_a_preempted_request_comes_before_those_that_have_not_begun(tiny_llama: Path) -> None:
    ended: list[int] = []
    async with running_system(
        tiny_llama,
        "ngram",
        verifier_options={"kv_cache_mib": 4 * BLOCK_MIB},
        gateway_options={"max_waiting": 4},
    ) as system:
        servicer = system.gateway.generations

        async def ask(number: int) -> None:
            await system.client.generate(PROMPTS[number], OPTIONS)
            ended.append(number)

        def has_come(number: int) -> bool:
            return servicer.num_requests + servicer.num_waiting + len(ended) > number

        tasks = []
        for number in range(NUM_REQUESTS):
            tasks.append(asyncio.create_task(ask(number)))
            await eventually(partial(has_come, number))
        await asyncio.gather(*tasks)
        assert sorted(ended) == list(range(NUM_REQUESTS)), "a preempted one counts not as one too many"
        assert ended[:2] == [0, 1]
        await eventually(lambda: nothing_is_held(system))


async def test_where_another_verifier_has_room_it_goes_on_there_at_once(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB) as (small_at, small),
        running_verifier(tiny_llama) as (large_at, large),
        running_gateway(tiny_llama, verifier=f"{small_at},{large_at}", max_waiting=0) as (address, gateway),
        AsyncClient(address, timeout_s=60) as client,
        AsyncExitStack() as stack,
    ):
        assert gateway.generations.backends
        verifiers = gateway.generations.backends.verifiers
        await eventually(lambda: verifiers.num_ready == 2)
        expected = (await client.generate(PROMPTS[0], OPTIONS)).token_ids
        # An older session is on the small one, and grows while the request runs there.
        older = await stack.enter_async_context(verify_stream(small_at))
        await older.open(PROMPTS[1], max_new_tokens=LENGTH - 5, ignore_eos=True)
        while len(older.token_ids) < 2 * BLOCK_TOKENS:
            await older.round()
        small_verifier, large_verifier = small.servicer.verifier, large.servicer.verifier
        assert small_verifier
        assert large_verifier
        found = await asyncio.gather(*(client.generate(PROMPTS[0], OPTIONS) for _ in range(8)))
        assert {answer.token_ids for answer in found} == {expected}
        assert sum(answer.num_failovers for answer in found) == 0
        assert await finish(older)
        await eventually(lambda: large_verifier.num_sessions == gateway.generations.num_requests == 0)


async def test_the_deadline_goes_on_while_a_preempted_request_waits(tiny_llama: Path) -> None:
    async with (
        running_system(tiny_llama, "ngram", verifier_options={"kv_cache_mib": 4 * BLOCK_MIB}) as system,
        verify_stream(system.verifier_address) as older,
    ):
        await older.open(PROMPTS[1], max_new_tokens=LENGTH - 5, ignore_eos=True)
        while len(older.token_ids) < 2 * BLOCK_TOKENS:
            await older.round()
        # The older session needs two of the four blocks and stays: there is no room for all of the answer.
        with pytest.raises(DeadlineExceededError):
            await system.client.generate(PROMPTS[0], OPTIONS, timeout_s=1.5)
        verifier, servicer = system.verifier.servicer.verifier, system.gateway.generations
        assert verifier
        await eventually(lambda: verifier.num_sessions == 1)
        await eventually(lambda: (servicer.num_requests, servicer.num_waiting) == (0, 0))


@pytest.mark.parametrize("method", ["ngram", "probe", "ngram+probe", "auto"])
async def test_while_a_preempted_request_waits_no_drafter_has_a_session_of_it(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    probe = StateProbe(TargetStateSpec((0, 3), True, (1,)))
    # Sizes are chosen where the method is: nothing else opens drafters later than at the start.
    options = replace(OPTIONS, method=method, draft_depth=None if method == "auto" else 3)
    (expected, *_) = await alone(tiny_llama, options)
    reader = InMemoryMetricReader()
    async with (
        running_system(
            tiny_llama,
            "ngram",
            "probe",
            telemetry=make_telemetry("test", metric_reader=reader),
            families=probe.families,
            verifier_options={"kv_cache_mib": 4 * BLOCK_MIB, "shared_dir": str(tmp_path)},
            drafter_options={"shared_dir": str(tmp_path)},
        ) as system,
        verify_stream(system.verifier_address) as older,
    ):
        host, servicer = system.drafter.servicer.host, system.gateway.generations
        assert host
        await older.open(PROMPTS[1], max_new_tokens=LENGTH - 5, ignore_eos=True)
        while len(older.token_ids) < 2 * BLOCK_TOKENS:
            await older.round()
        asking = asyncio.create_task(system.client.generate(PROMPTS[0], options))
        await eventually(lambda: total(reader, "specdec.preemptions") > 0)
        await eventually(lambda: (servicer.num_waiting, host.num_sessions) == (1, 0))
        # The older one ends, and its room is free.
        assert await finish(older)
        older.call.cancel()
        answer = await asking
        assert answer.token_ids == expected
        assert answer.speculation.num_accepted_tokens > 0
        await eventually(lambda: nothing_is_held(system))


async def test_what_was_computed_before_a_preemption_is_reused(tiny_llama: Path) -> None:
    reader = InMemoryMetricReader()
    async with running_system(
        tiny_llama,
        "ngram",
        telemetry=make_telemetry("test", metric_reader=reader),
        verifier_options={"kv_cache_mib": 7 * BLOCK_MIB},
    ) as system:
        await answers(system, OPTIONS)
        assert total(reader, "specdec.preemptions") > 0
        assert total(reader, "specdec.verifier.reused_tokens") >= BLOCK_TOKENS
        await eventually(lambda: nothing_is_held(system))
