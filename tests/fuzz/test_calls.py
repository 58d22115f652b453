"""Single calls with anything in them, on methods of every service, read to the end or left at any time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import ProjectionInfo
from specdec.transport.handshake import make_handshake
from specdec.v1 import common_pb2, drafter_pb2, target_state_pb2, verifier_pb2
from tests.fuzz.messages import wrong
from tests.fuzz.world import PROPER, World, code_of, fuzzing
from tests.refusals import PROMPT, generate_request
from tests.slow import quick_only

SAMPLING = SamplingParams(
    temperature=0.8,
    top_k=20,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    logit_bias={5: 1.0},
    seed=7,
)
PROJECTION = ProjectionInfo("0" * 64, 32, 32, 1e-6, "float32")
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
BEGIN, CANCEL = common_pb2.SESSION_CHANGE_BEGIN, common_pb2.SESSION_CHANGE_CANCEL
VERIFY_MANY = [
    verifier_pb2.VerifyManyRequest(
        items=[
            verifier_pb2.VerifyManyRequest.Item(
                session=number,
                change=BEGIN,
                request=verifier_pb2.VerifyRequest(
                    open=verifier_pb2.VerifyOpen(
                        handshake=make_handshake(), committed_token_ids=PROMPT, max_new_tokens=4
                    )
                ),
            )
            for number in (1, 2)
        ]
    ),
    verifier_pb2.VerifyManyRequest(
        items=[
            verifier_pb2.VerifyManyRequest.Item(
                session=1,
                request=verifier_pb2.VerifyRequest(
                    round=verifier_pb2.VerifyRound(
                        base_committed_length=len(PROMPT) + 1, draft_token_ids=[1, 2]
                    )
                ),
            ),
            verifier_pb2.VerifyManyRequest.Item(session=2, change=CANCEL),
        ]
    ),
]
DRAFT_MANY = [
    drafter_pb2.DraftManyRequest(
        items=[
            drafter_pb2.DraftManyRequest.Item(
                session=number,
                change=BEGIN,
                timeout_ms=10_000,
                request=drafter_pb2.DraftRequest(
                    open=drafter_pb2.DraftOpen(
                        handshake=make_handshake(),
                        drafter=drafter,
                        committed_token_ids=PROMPT,
                        max_length=64,
                    )
                ),
            )
            for number, drafter in enumerate(("ngram", "model"))
        ]
    ),
    drafter_pb2.DraftManyRequest(
        items=[
            drafter_pb2.DraftManyRequest.Item(
                session=1,
                request=drafter_pb2.DraftRequest(
                    round=drafter_pb2.DraftRound(committed_length=len(PROMPT), draft_depth=3)
                ),
            ),
            drafter_pb2.DraftManyRequest.Item(session=0, change=CANCEL),
        ]
    ),
]

METHODS: dict[str, tuple[str, str, Sequence[Message]]] = {
    "Generate": (
        "gateway",
        "GatewayService",
        [
            generate_request(method=method, sampling=SAMPLING.to_proto())
            for method in ("ngram", "model", "probe")
        ],
    ),
    "VerifyMany": ("verifier", "VerifierService", VERIFY_MANY),
    "DraftMany": ("drafter", "DrafterService", DRAFT_MANY),
    "StreamTargetState": (
        "verifier",
        "VerifierService",
        [target_state_pb2.StreamTargetStateRequest(session_id="0" * 32, projection_sha256="0" * 64)],
    ),
    "PutProjection": (
        "verifier",
        "VerifierService",
        [target_state_pb2.PutProjectionRequest(projection=PROJECTION.to_proto(), data=b"1234")],
    ),
    "GetTargetWeights": ("verifier", "VerifierService", [target_state_pb2.GetTargetWeightsRequest()]),
    "GetInfo": ("verifier", "VerifierService", [verifier_pb2.VerifierServiceGetInfoRequest()]),
    "GetInfo of the drafter": ("drafter", "DrafterService", [drafter_pb2.DrafterServiceGetInfoRequest()]),
}
"""By method: who has it, and requests that are right."""
STREAMED = {"PutProjection", "VerifyMany", "DraftMany"}
"""Methods that take several messages."""


async def ask(
    channel: grpc.aio.Channel, path: str, requests: Sequence[bytes], *, num_read: int | None, timeout_s: float
) -> grpc.StatusCode:
    """Send messages, read some answers (None: all), leave, and return what the call ended with."""
    call: Any = channel.stream_stream(path)(timeout=timeout_s)
    try:
        for request in requests:
            await call.write(request)
        await call.done_writing()
        while num_read is None or num_read > 0:
            if await call.read() is grpc.aio.EOF:
                break
            num_read = None if num_read is None else num_read - 1
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    if num_read is not None:
        call.cancel()
    return await code_of(call)


@pytest.mark.parametrize(
    ("method", "num_examples"),
    [*((method, 15) for method in METHODS), *quick_only([("Generate", 60)], [])],
)
def test_a_method_survives_any_request(method: str, num_examples: int, world: World) -> None:
    name, service, right = METHODS[method]
    path = f"/specdec.v1.{service}/{method.partition(' ')[0]}"

    @fuzzing(num_examples)
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        messages = st.sampled_from(right).flatmap(wrong)
        requests = data.draw(st.lists(messages, min_size=1, max_size=3 if method in STREAMED else 1))
        num_read = data.draw(st.none() | st.integers(0, 3))
        timeout_s = data.draw(st.sampled_from((30.0, 30.0, 0.02)))
        code = world.run(ask(world.channels[name], path, requests, num_read=num_read, timeout_s=timeout_s))
        assert code in PROPER
        world.run(world.assert_whole())

    survives()


@pytest.mark.parametrize("name", ["gateway", "verifier", "drafter"])
def test_a_port_survives_bytes_that_are_no_http(name: str, world: World) -> None:
    address = str(
        {
            "gateway": world.system.address,
            "verifier": world.system.verifier_address,
            "drafter": world.system.drafter_address,
        }[name]
    )
    host, _, port = address.rpartition(":")

    @fuzzing(10)
    @given(st.lists(st.binary(max_size=200), max_size=4), st.booleans())
    def survives(parts: list[bytes], is_http2: bool) -> None:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            try:
                for part in [HTTP2, *parts] if is_http2 else parts:
                    connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server has had enough of it
        world.run(world.assert_whole())

    survives()
