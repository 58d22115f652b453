"""Merged drafters that read different state of the target: who gets it, and what is sent to whom."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from drafter_service.families import FAMILIES
from gateway.replicas.sessions import VERIFYING, RemoteVerifierSession
from gateway.replicas.shared_calls import SharedCalls
from specdec.client import GenerateOptions, Generation
from specdec.contract.target_state import StateStorage, TargetStateSpec
from specdec.service.exporters import make_telemetry
from specdec.service.shared_call import serve_many
from specdec.transport.channel import aio_channel
from specdec.v1 import common_pb2, target_state_pb2, verifier_pb2, verifier_pb2_grpc
from tests.integration.gated_drafter import eventually
from tests.state_probe import StateProbe, assert_same, random_projection
from tests.systems import System, running_system
from tests.unit.test_stats import points

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
NUM_TOKENS = 24
PLAIN = GenerateOptions(method="none", max_new_tokens=NUM_TOKENS, ignore_eos=True)
HIDDEN_BYTES, KV_BYTES = 128, 64
"""Of a row of a hidden state, and of keys or of values."""

Specs = Mapping[str, TargetStateSpec]


@asynccontextmanager
async def probed_system(
    model: Path, probes: Mapping[str, StateProbe], shared_dir: Path, **options: Any
) -> AsyncIterator[System]:
    here = {"shared_dir": str(shared_dir)}
    families = {**FAMILIES, **{name: probe.families[name] for name, probe in probes.items()}}
    verifier_options = {**here, **options.pop("verifier_options", {})}
    drafter_options = {**here, **options.pop("drafter_options", {})}
    async with running_system(
        model,
        *probes,
        families=families,
        verifier_options=verifier_options,
        drafter_options=drafter_options,
        **options,
    ) as system:
        yield system


def probes_of(specs: Specs) -> dict[str, StateProbe]:
    return {name: StateProbe(spec, name=name) for name, spec in specs.items()}


async def merged(system: System, names: Mapping[str, Any]) -> Generation:
    """Generate by all drafters together, and check that the output is plain decoding's."""
    plain = await system.client.generate(PROMPT, PLAIN)
    options = GenerateOptions(
        method="+".join(names), draft_depth=4, max_new_tokens=NUM_TOKENS, ignore_eos=True
    )
    result = await system.client.generate(PROMPT, options)
    assert result.token_ids == plain.token_ids
    return result


TOO_MANY = "keeps at most 2"
CASES: dict[str, tuple[Specs, dict[str, str]]] = {
    "one of three is too much": (
        {"a": TargetStateSpec((0, 1)), "b": TargetStateSpec((2, 3)), "c": TargetStateSpec((1,))},
        {"b": TOO_MANY},
    ),
    "the first of three is too much": (
        {"a": TargetStateSpec((0, 1, 2)), "b": TargetStateSpec((3,)), "c": TargetStateSpec((2,))},
        {"a": TOO_MANY},
    ),
    "two that do not fit together": (
        {"a": TargetStateSpec((0, 1)), "b": TargetStateSpec((2, 3))},
        {"b": TOO_MANY},
    ),
    "layers that are not there": (
        {"a": TargetStateSpec((0, 77)), "b": TargetStateSpec((1,)), "c": TargetStateSpec(kv_layer_ids=(88,))},
        {"a": "layers are 0 to 3", "c": "Layer 88 of the target stores no KV"},
    ),
    "nobody": ({"a": TargetStateSpec((77,)), "b": TargetStateSpec((88,))}, {"a": "77", "b": "88"}),
}


@pytest.mark.parametrize("name", CASES)
async def test_only_as_many_drafters_are_left_out_as_must_be(
    name: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    specs, left_out = CASES[name]
    probes = probes_of(specs)
    async with probed_system(
        tiny_llama, probes, tmp_path, verifier_options={"max_hidden_layers": 2}
    ) as system:
        result = await merged(system, specs)
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        await eventually(lambda: verifier.export.num_sessions == verifier.num_sessions == 0)
    for proposer in result.speculation.proposers:
        if proposer.drafter in left_out:
            assert left_out[proposer.drafter] in proposer.fallback_reason
            assert "the verifier exports no target state for it" in proposer.fallback_reason
            assert not any(session.readings for session in probes[proposer.drafter].sessions)
        else:
            assert (proposer.num_fallback_rounds, proposer.fallback_reason) == (0, "")
            assert probes[proposer.drafter].sessions[-1].readings
    logged = {
        record.__dict__["drafter"]: record.__dict__["reason"]
        for record in caplog.records
        if record.message == "a drafter gets no target state" and record.levelno == logging.WARNING
    }
    assert logged.keys() == left_out.keys()
    assert all(left_out[drafter] in reason for drafter, reason in logged.items())


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_each_drafter_is_sent_what_it_reads_and_nothing_else(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    projection = random_projection(2, 32, 48, torch.float32)
    row_bytes = {"a": HIDDEN_BYTES, "b": 2 * HIDDEN_BYTES, "c": HIDDEN_BYTES + 2 * KV_BYTES}
    probes = probes_of(
        {
            "a": TargetStateSpec((3,)),
            "b": TargetStateSpec((0, 2), projection=projection.info),
            "c": TargetStateSpec(last_hidden_state=True, kv_layer_ids=(1,)),
        }
    )
    probes["b"].projection = projection
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    async with probed_system(
        tiny_llama, probes, tmp_path, telemetry=telemetry, drafter_options={"target_state": mode}
    ) as system:
        result = await merged(system, probes)
        alone = await merged(system, {"c": None})
    assert not any(proposer.fallback_reason for proposer in result.speculation.proposers)
    assert alone.speculation.num_fallback_rounds == 0
    storage = StateStorage.STREAM if mode == "stream" else StateStorage.SHARED_MEMORY
    assert all(session.storages == {storage} for probe in probes.values() for session in probe.sessions)
    together, by_itself = probes["c"].sessions
    assert_same(together.readings[0], by_itself.readings[0])
    sent = sum(point.value for point in points(reader, "specdec.verifier.streamed_state"))
    read = sum(
        row_bytes[name] * session.readings[-1].length
        for name, probe in probes.items()
        for session in probe.sessions
    )
    most = (sum(row_bytes.values()) + row_bytes["c"]) * (len(PROMPT) + NUM_TOKENS)
    assert read <= sent <= most if mode == "stream" else sent == 0
    telemetry.shutdown()  # until then it keeps the services, whose load it reads


async def test_a_projection_is_sent_to_its_drafter_alone(tiny_llama: Path, tmp_path: Path) -> None:
    projection = random_projection(2, 32, 16, torch.float32)
    probes = probes_of(
        {
            "a": TargetStateSpec((0, 2), projection=projection.info),
            "b": TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True),
        }
    )
    probes["a"].projection = projection
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    async with probed_system(
        tiny_llama, probes, tmp_path, telemetry=telemetry, drafter_options={"target_state": "stream"}
    ) as system:
        result = await merged(system, probes)
    assert not any(proposer.fallback_reason for proposer in result.speculation.proposers)
    sent = sum(point.value for point in points(reader, "specdec.verifier.streamed_state"))
    row_bytes = 16 * 4 + HIDDEN_BYTES + 2 * KV_BYTES
    assert row_bytes * len(PROMPT) <= sent <= row_bytes * (len(PROMPT) + NUM_TOKENS)
    telemetry.shutdown()


class OlderVerifier(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
    """Knows one spec of a session, and exports it or nothing."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    async def Verify(self, requests: Any, context: Any) -> None:  # noqa: N802
        await anext(aiter(requests))
        first = verifier_pb2.VerifyResult(bonus_token_id=1, committed_length=2, cached_length=1)
        if not self._refusal:
            first.target_state.CopyFrom(target_state_pb2.TargetStateRef(session_id="s"))
        opened = verifier_pb2.VerifyOpened(first=first, target_state_refusal=self._refusal)
        opened.handshake.CopyFrom(common_pb2.Handshake(protocol_version=2))
        await context.write(verifier_pb2.VerifyResponse(opened=opened))

    async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        await serve_many(self.Verify, requests, context, verifier_pb2.VerifyManyResponse)


@pytest.mark.parametrize("refusal", ["", "layer 9 is not there"])
async def test_an_older_verifier_serves_all_drafters_or_none(refusal: str) -> None:
    server = grpc.aio.server()
    verifier_pb2_grpc.add_VerifierServiceServicer_to_server(OlderVerifier(refusal), server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with aio_channel(address) as channel:
        session = RemoteVerifierSession(
            SharedCalls(VERIFYING, lambda: channel, address),
            address,
            verifier_pb2.VerifyOpen(),
            20.0,
            ["a", "b"],
            on_load=lambda _: None,
        )
        async with session:
            state: Any = (await session.open("")).target_state
    await server.stop(None)
    assert state.refusals == ({"a": refusal, "b": refusal} if refusal else {})
