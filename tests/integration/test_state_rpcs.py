"""The verifier's methods for target state, called by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from specdec.contract.errors import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
    UnimplementedError,
    from_rpc_error,
)
from specdec.contract.target_state import (
    ProjectionInfo,
    StateStorage,
    TargetStateSpec,
    TensorRef,
    storage_kind,
)
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.state.view import Projection
from specdec.transport.channel import aio_channel
from specdec.v1 import target_state_pb2 as pb
from specdec.v1 import verifier_pb2_grpc
from tests.raw_streams import run_session, until
from tests.refusals import shared
from tests.state_probe import all_of, random_projection, ref_of, state_session
from tests.systems import running_verifier
from verifier_service.server import VerifierServer

PROMPT = [(7 * i) % 250 for i in range(BLOCK_TOKENS + 9)]
PROJECTION = random_projection(2, 32, 48, torch.float32)
SPEC = TargetStateSpec((0, 2), True, (1,), projection=PROJECTION.info)
ROW_BYTES = {"hidden.0": 128, "hidden.2": 128, "last_hidden": 128, "kv.1.key": 64, "kv.1.value": 64}
"""Of each tensor of the spec."""
MAX_STREAMS = 4
"""Streams a session may have."""


class Methods:
    """A verifier's methods; errors are raised as their own types."""

    def __init__(self, channel: Any, server: VerifierServer, address: str) -> None:
        self._stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
        self.server, self.address = server, address

    async def put(self, *messages: pb.PutProjectionRequest) -> None:
        try:
            await self._stub.PutProjection(messages, timeout=20)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def stream(self, session_id: str, **fields: Any) -> AsyncIterator[pb.StreamTargetStateResponse]:
        request = pb.StreamTargetStateRequest(session_id=session_id, **fields)
        call = self._stub.StreamTargetState(request, timeout=20)
        try:
            async for chunk in call:
                yield chunk
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def first(self, session_id: str, **fields: Any) -> pb.StreamTargetStateResponse:
        chunks = self.stream(session_id, **fields)
        try:
            return await anext(chunks)
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def weights(self) -> pb.GetTargetWeightsResponse:
        try:
            answer: pb.GetTargetWeightsResponse = await self._stub.GetTargetWeights(
                pb.GetTargetWeightsRequest(), timeout=20
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def assert_nothing_is_streamed(self) -> None:
        verifier = self.server.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.export.num_streams == verifier.export.num_sessions == 0)


@asynccontextmanager
async def methods_of(model: Path, shared_dir: Path, **options: Any) -> AsyncIterator[Methods]:
    async with (
        running_verifier(model, shared_dir=str(shared_dir), **options) as (address, server),
        aio_channel(address) as channel,
    ):
        yield Methods(channel, server, address)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def methods(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Methods]:
    async with methods_of(tiny_llama, tmp_path_factory.mktemp("shared")) as methods:
        yield methods


def messages(info: ProjectionInfo, *parts: bytes) -> list[pb.PutProjectionRequest]:
    return [
        pb.PutProjectionRequest(projection=info.to_proto()),
        *(pb.PutProjectionRequest(data=part) for part in parts),
    ]


def sizes(chunk: pb.StreamTargetStateResponse) -> dict[str, int]:
    return {tensor.name: len(tensor.data) for tensor in chunk.tensors}


@shared
async def test_a_stream_begins_where_it_is_told_and_ends_with_the_session(methods: Methods) -> None:
    async with state_session(methods.address, PROMPT, SPEC) as (verify, ref):
        start = len(PROMPT) - 3
        chunks = methods.stream(ref.session_id, start_position=start)
        chunk = await anext(chunks)
        assert (chunk.start_position, chunk.num_positions) == (start, 3)
        assert sizes(chunk) == {name: 3 * size for name, size in ROW_BYTES.items()}
        whole = await methods.first(ref.session_id)
        for tensor, all_rows in zip(chunk.tensors, whole.tensors, strict=True):
            assert all_rows.data.endswith(tensor.data)
        for _ in range(3):
            later = ref_of(await verify.round())
            chunk = await anext(chunks)
            assert chunk.start_position + chunk.num_positions == later.cached_length
        await verify.call.done_writing()
        assert [chunk async for chunk in chunks] == []
    await methods.assert_nothing_is_streamed()


@shared
async def test_a_stream_of_what_is_not_there(methods: Methods) -> None:
    with pytest.raises(NotFoundError) as raised:
        await methods.first("0" * 32)
    assert raised.value.reason == "UNKNOWN_SESSION"
    async with state_session(methods.address, PROMPT, SPEC) as (_, ref):
        with pytest.raises(NotFoundError) as raised:
            await methods.first(ref.session_id, projection_sha256="0" * 64)
        assert raised.value.reason == "UNKNOWN_PROJECTION"
        other = random_projection(1, 32, 48, torch.float32)
        with pytest.raises(InvalidArgumentError, match="No session here has that projection"):
            await methods.put(*messages(other.info, other.to_bytes()))
        async with state_session(methods.address, PROMPT, TargetStateSpec((0,), projection=other.info)):
            await methods.put(*messages(other.info, other.to_bytes()))
            with pytest.raises(InvalidArgumentError, match="not the one of the session's spec"):
                await methods.first(ref.session_id, projection_sha256=other.info.sha256)
    with pytest.raises(NotFoundError) as raised:
        await methods.first(ref.session_id)
    assert raised.value.reason == "UNKNOWN_SESSION"
    await methods.assert_nothing_is_streamed()


@shared
async def test_a_stream_has_the_tensors_that_were_asked_for(methods: Methods) -> None:
    num_rows = len(PROMPT)
    async with state_session(methods.address, PROMPT, SPEC) as (_, ref):
        wanted = ["kv.1.value", "hidden.2", "hidden.2"]
        chunk = await methods.first(ref.session_id, tensor_names=wanted)
        assert sizes(chunk) == {name: num_rows * ROW_BYTES[name] for name in ("hidden.2", "kv.1.value")}
        whole = await methods.first(ref.session_id)
        rows = {tensor.name: tensor.data for tensor in whole.tensors}
        assert all(rows[tensor.name] == tensor.data for tensor in chunk.tensors)
        await methods.put(*messages(PROJECTION.info, PROJECTION.to_bytes()))
        projected = {"projection_sha256": PROJECTION.info.sha256}
        chunk = await methods.first(ref.session_id, tensor_names=["hidden.0", "last_hidden"], **projected)
        assert list(sizes(chunk)) == ["projected", "last_hidden"]
        for name in ("hidden.1", "generations", "projected", ""):
            with pytest.raises(InvalidArgumentError, match=f"does not export '{name}'") as raised:
                await methods.first(ref.session_id, tensor_names=["hidden.2", name])
            assert raised.value.field == "tensor_names"
    await methods.assert_nothing_is_streamed()


@shared
async def test_a_session_is_streamed_so_many_times_and_not_more(methods: Methods) -> None:
    async with state_session(methods.address, PROMPT, SPEC) as (_, ref):
        streams = [methods.stream(ref.session_id) for _ in range(MAX_STREAMS)]
        for chunks in streams:
            await anext(chunks)
        with pytest.raises(ResourceExhaustedError) as raised:
            await methods.first(ref.session_id)
        assert raised.value.reason == "TOO_MANY_STREAMS"
        assert raised.value.retry_after_s
        await streams.pop().aclose()  # type: ignore[attr-defined]
        verifier = methods.server.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.export.num_streams == MAX_STREAMS - 1)
        assert (await methods.first(ref.session_id)).num_positions == len(PROMPT)
        for chunks in streams:
            await chunks.aclose()  # type: ignore[attr-defined]
    await methods.assert_nothing_is_streamed()


@shared
async def test_a_projection_is_put_in_parts_and_applied(methods: Methods) -> None:
    data, prompt = PROJECTION.to_bytes(), PROMPT[:40]
    async with state_session(methods.address, prompt, SPEC) as (_, ref):
        await methods.put(*messages(PROJECTION.info, data[:1000], data[1000:1001], b"", data[1001:]))
        chunk = await methods.first(ref.session_id, projection_sha256=PROJECTION.info.sha256)
        raw = await methods.first(ref.session_id)
    assert sizes(chunk) == {
        "projected": len(prompt) * 48 * 4,
        **{name: len(prompt) * ROW_BYTES[name] for name in ("last_hidden", "kv.1.key", "kv.1.value")},
    }
    rows = {tensor.name: floats(tensor.data) for tensor in raw.tensors}
    features = torch.cat([rows[name].view(len(prompt), 32) for name in ("hidden.0", "hidden.2")], -1)
    (projected,) = (tensor.data for tensor in chunk.tensors if tensor.name == "projected")
    actual = floats(projected).view(len(prompt), 48)
    torch.testing.assert_close(actual, PROJECTION(features), atol=1e-5, rtol=1e-5)


def floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def of_sizes(input_size: int, output_size: int, dtype: str = "float32") -> ProjectionInfo:
    return ProjectionInfo("0" * 64, input_size, output_size, 1e-6, dtype)


def wrong_puts() -> dict[str, tuple[Sequence[pb.PutProjectionRequest], str]]:
    """Return calls to be refused, and a part of what each refusal must say."""
    info, data = PROJECTION.info, PROJECTION.to_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    other_epsilon = ProjectionInfo(info.sha256, info.input_size, info.output_size, 1e-5, info.dtype)
    return {
        "nothing": ((), "No projection was sent"),
        "other weights": (messages(info, flipped), "not those its checksum names"),
        "other epsilon": (messages(other_epsilon, data), "No session here"),
        "too little": (messages(info, data[:-1]), "bytes are not a projection"),
        "too much": (messages(info, data, b"\0"), "more data"),
        "of no session": (messages(of_sizes(32, 32), b"data"), "No session here"),
        "no such type": (messages(of_sizes(32, 32, "float31")), "No session here"),
        "no description": ([pb.PutProjectionRequest(data=b"data")], "No projection was sent"),
    }


@shared
@pytest.mark.parametrize("name", wrong_puts())
async def test_a_projection_that_is_not_what_it_says_is_refused(name: str, methods: Methods) -> None:
    requests, fragment = wrong_puts()[name]
    async with state_session(methods.address, PROMPT, SPEC):
        with pytest.raises(InvalidArgumentError, match=fragment):
            await methods.put(*requests)
    verifier = methods.server.servicer.verifier
    assert verifier is not None
    with pytest.raises(NotFoundError):
        verifier.export.projection("0" * 64)


@shared
async def test_one_projection_is_received_at_a_time(methods: Methods) -> None:
    read: list[str] = []
    may_end = asyncio.Event()

    async def upload(name: str) -> AsyncIterator[pb.PutProjectionRequest]:
        description, data = messages(PROJECTION.info, PROJECTION.to_bytes())
        yield description
        read.append(name)
        await may_end.wait()
        yield data

    async with state_session(methods.address, PROMPT, SPEC):
        put = methods.server.servicer.PutProjection
        puts = [asyncio.ensure_future(put(upload(name), None)) for name in ("first", "second")]  # type: ignore[arg-type]
        await until(lambda: read == ["first"])
        for _ in range(20):
            await asyncio.sleep(0)
        assert read == ["first"]
        may_end.set()
        await asyncio.gather(*puts)
        assert read == ["first", "second"]


async def test_the_projection_not_used_for_longest_is_forgotten(tiny_llama: Path, tmp_path: Path) -> None:
    projections = [Projection(torch.full((8, 32), float(index)), torch.ones(8), 1e-6) for index in range(5)]
    async with methods_of(tiny_llama, tmp_path, target_state="stream") as methods:

        async def is_known(projection: Projection, *, put: bool = False) -> bool:
            spec = TargetStateSpec((0,), projection=projection.info)
            async with state_session(methods.address, PROMPT, spec) as (_, ref):
                if put:
                    await methods.put(*messages(projection.info, projection.to_bytes()))
                try:
                    await methods.first(ref.session_id, projection_sha256=projection.info.sha256)
                except NotFoundError:
                    return False
                return True

        for projection in projections[:4]:
            assert await is_known(projection, put=True)
        assert await is_known(projections[0])  # and used, which makes the second the oldest
        assert await is_known(projections[4], put=True)
        known = [await is_known(projection) for projection in projections]
        assert known == [True, False, True, True, True]


async def test_projections_are_kept_up_to_so_many_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    projections = [Projection(torch.full((8, 32), float(index)), torch.ones(8), 1e-6) for index in range(3)]
    size = len(projections[0].to_bytes())
    async with methods_of(tiny_llama, tmp_path, target_state="stream") as methods:
        verifier = methods.server.servicer.verifier
        assert verifier is not None
        verifier.export.max_projection_bytes = 2 * size
        for projection in projections:
            async with state_session(
                methods.address, PROMPT, TargetStateSpec((0,), projection=projection.info)
            ):
                await methods.put(*messages(projection.info, projection.to_bytes()))
        assert verifier.export.num_projection_bytes == 2 * size
        with pytest.raises(NotFoundError):
            verifier.export.projection(projections[0].info.sha256)


async def test_a_verifier_told_to_share_by_handle_only_does_not_stream(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with (
        methods_of(tiny_llama, tmp_path, target_state="handle") as methods,
        state_session(methods.address, PROMPT, SPEC) as (_, ref),
    ):
        with pytest.raises(UnimplementedError) as raised:
            await methods.first(ref.session_id)
        assert raised.value.reason == "NO_STATE_STREAM"


def kinds(tensors: Iterable[TensorRef]) -> set[StateStorage]:
    return {storage_kind(tensor.storage) for tensor in tensors}


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_a_handle_says_where_everything_is_once(mode: str, tiny_llama: Path, tmp_path: Path) -> None:
    async with (
        methods_of(tiny_llama, tmp_path, target_state=mode) as methods,
        state_session(methods.address, PROMPT, all_of("llama"), max_new_tokens=60) as (verify, ref),
    ):
        assert ref.verifier_uri == methods.address
        assert kinds(ref.tensors) == {StateStorage.SHARED_MEMORY if mode == "handle" else StateStorage.STREAM}
        verifier = methods.server.servicer.verifier
        assert verifier is not None
        for tensor in ref.tensors[1:]:
            assert tensor.shape == tuple(verifier.pool.tensor(tensor.name).shape)
            assert tensor.attention_type == ("full_attention" if tensor.name.startswith("kv.") else "")
        assert ref.block_tokens == BLOCK_TOKENS
        assert ref.max_length == len(PROMPT) + 60
        assert len(PROMPT) <= len(ref.block_ids) * BLOCK_TOKENS < ref.max_length, "the rest comes later"
        assert ref.cached_length == len(PROMPT)
        told, is_over = ref, False
        while not is_over:
            result = await verify.round()
            later, is_over = ref_of(result), bool(result.finish_reason)
            blocks = (*told.block_ids, *later.block_ids)
            assert later == told.at(len(verify.token_ids) - 1, blocks)
            assert not later.tensors
            told = replace(told, block_ids=blocks)
        assert len(set(told.block_ids)) == len(told.block_ids) == -(-ref.max_length // BLOCK_TOKENS)


async def test_a_session_without_a_spec_exports_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    async with methods_of(tiny_llama, tmp_path) as methods:
        results = await run_session(methods.address, PROMPT, max_new_tokens=4)
        assert len(results) > 1
        assert not any(result.HasField("target_state") for result in results)
        verifier = methods.server.servicer.verifier
        assert verifier is not None
        assert verifier.pool.hidden == {}


async def test_weights_are_shared_once(tiny_llama: Path, tmp_path: Path) -> None:
    async with methods_of(tiny_llama, tmp_path, target_state="handle") as methods:
        first, second = await methods.weights(), await methods.weights()
    assert first == second
    assert first.model_id
    assert list(first.embedding.shape) == list(first.lm_head.shape) == [260, 32]
    paths = {first.embedding.shared_memory.path, first.lm_head.shared_memory.path}
    assert len(paths) == 1
    assert first.embedding.shared_memory.offset != first.lm_head.shared_memory.offset  # not tied
    async with methods_of(tiny_llama, tmp_path, target_state="stream") as methods:
        private = await methods.weights()
    assert private.embedding.WhichOneof("storage") == private.lm_head.WhichOneof("storage") == "stream"


async def test_weights_for_which_there_is_no_room_leave_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """A second failure costs no more than the first."""
    async with methods_of(tiny_llama, tmp_path, target_state="handle") as methods:
        verifier = methods.server.servicer.verifier
        assert verifier is not None
        memory = verifier.pool.memory
        (folder,) = entries(tmp_path)
        folder.rename(tmp_path / "moved")  # where nothing can be made any more
        for _ in range(2):
            with pytest.raises(SpecdecError) as raised:
                await methods.weights()
            assert raised.value.reason == "SHARED_MEMORY_FULL"
            assert len(entries(tmp_path / "moved")) == 2
        (tmp_path / "moved").rename(folder)
        assert (await methods.weights()).embedding.shared_memory.path.startswith(str(folder))
        assert memory.kind is StateStorage.SHARED_MEMORY


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())
