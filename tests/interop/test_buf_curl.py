"""The services seen by `buf curl`: another implementation of gRPC, which knows them by reflection only."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from specdec.contract.protocol import PROTOCOL_VERSION
from tests.integration.gated_drafter import Gate, eventually
from tests.refusals import PROMPT
from tests.systems import System

BUF = Path(sys.executable).with_name("buf")
HEALTH = "grpc.health.v1.Health/Check"
GENERATE = "specdec.v1.GatewayService/Generate"
REQUEST = {"tokenIds": {"tokenIds": PROMPT}, "maxNewTokens": 6, "ignoreEos": True, "method": "ngram"}
GATED = {**REQUEST, "method": "gated"}


async def buf_curl(
    address: str, method: str, request: dict[str, Any], *options: str
) -> asyncio.subprocess.Process:
    """Start a call."""
    return await asyncio.create_subprocess_exec(
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options),
        *("--data", json.dumps(request), f"http://{address}/{method}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def outcome(call: asyncio.subprocess.Process) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages of a call that has ended, and its error, which is empty if there was none."""
    output, errors = await asyncio.wait_for(call.communicate(), 60)
    assert (call.returncode == 0) == (not errors), errors
    return documents(output.decode()), json.loads(errors) if errors else {}


def documents(text: str) -> list[dict[str, Any]]:
    """Split JSON documents that follow one another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def num_sessions(system: System) -> int:
    assert system.verifier.servicer.verifier
    return system.verifier.servicer.verifier.num_sessions


@pytest.mark.parametrize("name", ["gateway", "verifier", "drafter"])
async def test_every_service_is_found_by_reflection_and_healthy(name: str, system: System) -> None:
    address = {
        "gateway": system.address,
        "verifier": system.verifier_address,
        "drafter": system.drafter_address,
    }[name]
    service = f"specdec.v1.{name.capitalize()}Service"
    messages, error = await outcome(await buf_curl(address, HEALTH, {"service": service}))
    assert (messages, error) == ([{"status": "SERVING"}], {})
    messages, error = await outcome(await buf_curl(address, f"{service}/GetInfo", {}))
    assert not error
    assert messages[0]["protocolVersion"] == PROTOCOL_VERSION


async def test_an_answer_is_streamed(system: System) -> None:
    messages, error = await outcome(await buf_curl(system.address, GENERATE, REQUEST))
    assert not error
    assert messages[0]["started"]["inputTokens"] == len(PROMPT)
    tokens: Sequence[Any] = [
        token for message in messages for token in message.get("chunk", {}).get("tokens", ())
    ]
    finished = messages[-1]["finished"]
    assert len(tokens) == finished["usage"]["outputTokens"] == 6
    assert finished["finishReason"] == "FINISH_REASON_LENGTH"


async def test_a_call_that_is_killed_frees_its_session(gated: tuple[System, Gate]) -> None:
    system, gate = gated
    call = await buf_curl(system.address, GENERATE, GATED)
    await gate.reached()
    assert num_sessions(system) == 1
    call.kill()
    await call.communicate()
    await eventually(lambda: num_sessions(system) == 0)


async def test_a_deadline_ends_a_call_and_frees_its_session(gated: tuple[System, Gate]) -> None:
    system, gate = gated
    call = await buf_curl(system.address, GENERATE, GATED, "--timeout", "3s")
    await gate.reached()
    assert num_sessions(system) == 1
    _, error = await outcome(call)
    assert error["code"] == "deadline_exceeded"
    await eventually(lambda: num_sessions(system) == 0)


async def test_error_details_name_the_field(system: System) -> None:
    request = {**REQUEST, "sampling": {"temperature": -1}}
    _, error = await outcome(await buf_curl(system.address, GENERATE, request))
    assert error["code"] == "invalid_argument"
    assert "temperature is -1" in error["message"]
    values = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    bad = error_details_pb2.BadRequest.FromString(values["google.rpc.BadRequest"])
    assert bad.field_violations[0].field == "temperature"
    info = error_details_pb2.ErrorInfo.FromString(values["google.rpc.ErrorInfo"])
    assert info.domain == "specdec.v1"
