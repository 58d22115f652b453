"""A drafter that misuses the verifier's methods for target state: nothing crashes, waits or stays behind."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    from_rpc_error,
)
from specdec.contract.target_state import TargetStateSpec
from specdec.transport.channel import aio_channel
from specdec.v1 import target_state_pb2 as pb
from specdec.v1 import verifier_pb2_grpc
from tests.raw_streams import output_of, until
from tests.refusals import PROMPT, shared
from tests.state_probe import all_of, random_projection, state_session
from tests.systems import running_verifier
from tests.tiny_models import save_tiny_model
from verifier_service import service
from verifier_service.server import VerifierServer

CONTEXT = 8192
"""So much that a session's state is more than gRPC buffers."""
LONG_PROMPT = [i % 250 for i in range(CONTEXT - 200)]
SHORT_S = 0.5
PROJECTION = random_projection(1, 32, 32, torch.float32)
SPEC = TargetStateSpec((0,), projection=PROJECTION.info)


class Target:
    """A verifier with the patience of half a second, and its methods."""

    def __init__(self, address: str, server: VerifierServer, channel: grpc.aio.Channel) -> None:
        self.address, self.server = address, server
        self.stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)

    def stream(self, session_id: str, **fields: Any) -> Any:
        request = pb.StreamTargetStateRequest(session_id=session_id, **fields)
        return self.stub.StreamTargetState(request, timeout=30)

    async def assert_clean(self) -> None:
        verifier = self.server.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.num_sessions == verifier.export.num_sessions == 0)
        await until(lambda: verifier.export.num_streams == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        assert len(await output_of(self.address, PROMPT, ignore_eos=True)) == 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "long-llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    async with (
        running_verifier(model, kv_cache_mib=16.0) as (address, server),
        aio_channel(address) as channel,
    ):
        server.servicer.write_timeout_s = server.servicer.upload_timeout_s = SHORT_S
        yield Target(address, server, channel)


def assert_no_defect(caplog: Any) -> None:
    """Check that no defect was logged; gRPC's own lines are ignored."""
    ours = [record for record in caplog.records if not record.name.startswith("grpc")]
    assert not [record for record in ours if record.levelno >= logging.ERROR]


async def error_of(call: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    return from_rpc_error(raised.value)


class Writes:
    """Watches what a verifier writes: a stream is stuck once one of its messages is not taken at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._send = service.send
        self._begun: dict[object, float] = {}
        self._slow: set[object] = set()
        monkeypatch.setattr(service, "send", self._watch)

    async def _watch(self, context: Any, message: Any, timeout_s: float) -> None:
        self._begun[context] = time.monotonic()
        try:
            await self._send(context, message, timeout_s)
        finally:
            self.num_stuck()
            del self._begun[context]

    def num_stuck(self) -> int:
        """Return how many streams are stuck, or were."""
        late = time.monotonic() - SHORT_S / 4
        self._slow.update(context for context, begun in self._begun.items() if begun < late)
        return len(self._slow)


@shared
async def test_state_that_is_not_read_outlives_no_session(
    target: Target, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(monkeypatch)
    async with state_session(target.address, LONG_PROMPT, all_of("llama")) as (verify, ref):
        unread = [target.stream(ref.session_id) for _ in range(4)]
        await until(lambda: writes.num_stuck() == 4)
        assert (await verify.round()).committed_length == len(LONG_PROMPT) + 2
    with caplog.at_level(logging.INFO):
        await target.assert_clean()
        error = await error_of(unread[0])
        assert isinstance(error, DeadlineExceededError)
        assert error.reason == "NOT_READ"
        for call in unread[1:]:
            call.cancel()
        await target.assert_clean()
    assert_no_defect(caplog)


@shared
async def test_a_reader_that_goes_away_is_no_defect(target: Target, caplog: Any) -> None:
    target.server.servicer.write_timeout_s = 30.0
    try:
        async with state_session(target.address, LONG_PROMPT, all_of("llama")) as (_, ref):
            call = target.stream(ref.session_id)
            await call.read()
            await asyncio.sleep(0.2)  # the verifier is in a write by now
            call.cancel()
        await target.assert_clean()
    finally:
        target.server.servicer.write_timeout_s = SHORT_S
    assert_no_defect(caplog)


@shared
async def test_state_is_read_by_whoever_knows_the_session_and_by_nobody_else(target: Target) -> None:
    async with state_session(target.address, PROMPT, all_of("llama")) as (_, ref):
        other = target.stream(ref.session_id)
        assert (await other.read()).num_positions == len(PROMPT)
        other.cancel()
        for guess in ("", "0" * 32, ref.session_id[:-1], ref.session_id.upper() + "x", "x" * 1_000_000):
            assert isinstance(await error_of(target.stream(guess)), NotFoundError)
        strange = target.stream(ref.session_id, projection_sha256="x" * 1_000_000)
        assert isinstance(await error_of(strange), NotFoundError)
    assert isinstance(await error_of(target.stream(ref.session_id)), NotFoundError)
    await target.assert_clean()


@shared
async def test_positions_that_never_come_are_waited_for_until_the_session_ends(target: Target) -> None:
    verifier = target.server.servicer.verifier
    assert verifier is not None
    async with state_session(target.address, PROMPT, all_of("llama")) as (verify, ref):
        calls = [target.stream(ref.session_id, start_position=start) for start in (1000, 2**32 - 1)]
        await until(lambda: verifier.export.num_streams == 2)
        await verify.round()
    for call in calls:
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    await target.assert_clean()


@shared
async def test_a_swarm_of_readers_is_refused_and_slows_nobody_down(target: Target) -> None:
    async with state_session(target.address, PROMPT, all_of("llama")) as (verify, ref):
        kept = [target.stream(ref.session_id) for _ in range(4)]
        for call in kept:
            await call.read()
        errors = await asyncio.gather(*(error_of(target.stream(ref.session_id)) for _ in range(200)))
        assert all(isinstance(error, ResourceExhaustedError) for error in errors)
        assert (await verify.round()).committed_length == len(PROMPT) + 2
        for call in kept:
            call.cancel()
    await target.assert_clean()


async def upload(target: Target) -> None:
    """Put the projection as a drafter should."""
    first = pb.PutProjectionRequest(projection=PROJECTION.info.to_proto(), data=PROJECTION.to_bytes())
    await target.stub.PutProjection(iter([first]), timeout=20)


@shared
async def test_an_upload_that_stops_holds_nobody_up(target: Target) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(state_session(target.address, PROMPT, SPEC))
        # One says nothing at all, one stops in the middle.
        mute, stopped = target.stub.PutProjection(timeout=30), target.stub.PutProjection(timeout=30)
        await stopped.write(pb.PutProjectionRequest(projection=PROJECTION.info.to_proto(), data=b"1234"))
        async with asyncio.timeout(20):
            await upload(target)
        for call in (stopped, mute):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert isinstance(from_rpc_error(raised.value), DeadlineExceededError)
            assert "s; send it" in from_rpc_error(raised.value).message, (
                "it is the verifier's, not the call's"
            )
    await target.assert_clean()


@shared
async def test_weights_are_taken_for_projections_of_live_sessions_only(target: Target) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await upload(target)
    assert isinstance(from_rpc_error(raised.value), InvalidArgumentError)
    async with state_session(target.address, PROMPT, SPEC):
        for projection in (
            pb.Projection(),
            pb.Projection(sha256="x" * 5_000_000),
            pb.Projection(
                sha256=PROJECTION.info.sha256, input_size=2**32 - 1, output_size=2**32 - 1, dtype="float32"
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await target.stub.PutProjection(
                    iter([pb.PutProjectionRequest(projection=projection)]), timeout=20
                )
            assert isinstance(from_rpc_error(raised.value), InvalidArgumentError)
    await target.assert_clean()
