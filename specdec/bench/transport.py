"""Measures what reading target state costs a drafter, by handle and by stream, per round and per prompt.

A real verifier is driven over gRPC, and its state is read with the code of the drafter service.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc

from specdec.bench.transport_needs import HANDLE, STREAM, Need, needs_of
from specdec.bench.transport_report import TransportRow
from specdec.bench.transport_session import VerifySession
from specdec.contract.errors import InternalError, UnavailableError, from_rpc_error
from specdec.contract.target_state import GENERATIONS, PROJECTED, TargetStateRef
from specdec.transport.channel import aio_channel
from specdec.v1 import verifier_pb2, verifier_pb2_grpc

if TYPE_CHECKING:
    from specdec.state.reader import StateReader, StateSession
    from specdec.state.view import TargetStateView

_NUM_WARMUP_ROUNDS = 5
_NUM_WARMUP_TOKENS = 64
"""Length of the prompt of the unmeasured session before each measured session, tokens."""
_MIRROR_BYTES = 2**40
_QUIET_TIMEOUT_S = 10.0
_QUIET_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """What is measured."""

    model: str
    """Model that the verifier runs: "default", a folder or a hub id."""
    device: str = "cpu"
    """Device of the verifier and the reader."""
    shared_dir: str = "/dev/shm"
    """Memory-backed directory of the handles."""
    prefill_tokens: int = 1024
    """Length of the prompt, tokens."""
    round_tokens: int = 5
    """New tokens of a round, bonus included."""
    prefills: int = 5
    """First views per row, each by a new reader."""
    repeats: int = 50
    """Measured rounds per row."""


@dataclass(slots=True)
class _Samples:
    """Times in nanoseconds and sizes in bytes."""

    round_ns: list[int] = field(default_factory=list)
    round_bytes: list[int] = field(default_factory=list)
    read_ns: list[int] = field(default_factory=list)
    prefill_ns: list[int] = field(default_factory=list)
    again_ns: list[int] = field(default_factory=list)
    prefill_bytes: int = 0
    num_compared_bytes: int = 0


async def measure(
    verifier: str, config: TransportConfig, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[TransportRow]:
    """Measure all rows of a model.

    Args:
        verifier: address of an idle verifier of `config.model` on this host.
        on_progress: called with the number of rows done and of all rows.

    Raises:
        SpecdecError: the verifier refused, or exports no state.
        InternalError: the two transports gave different data.
    """
    try:
        async with aio_channel(verifier) as channel:
            stub = verifier_pb2_grpc.VerifierServiceStub(channel)
            info = await stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest(), timeout=10)
            needs = needs_of(config.model, info.model.dtype)
            total = sum(len(need.transports) for need in needs)
            rows: list[TransportRow] = []
            for need in needs:
                for transport in need.transports:
                    on_progress(len(rows), total)
                    samples = await _Bench(stub, config, need, transport).run()
                    rows.append(_row(info.model.model_id, need, transport, config, samples))
            on_progress(total, total)
            return rows
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class _Bench:
    """Measures one row."""

    def __init__(self, stub: Any, config: TransportConfig, need: Need, transport: str) -> None:
        self._stub = stub
        self._config = config
        self._need = need
        self._transport = transport

    async def run(self) -> _Samples:
        """Run once unmeasured, so that memory is made and a projection is sent, and then measure."""
        config = replace(self._config, prefill_tokens=_NUM_WARMUP_TOKENS, prefills=1, repeats=1)
        await self._run(config)
        return await self._run(self._config)

    async def _run(self, config: TransportConfig) -> _Samples:
        samples = _Samples()
        async with self._verify(config) as session:
            for _ in range(config.prefills):
                async with self._reader(self._transport) as reader:
                    await self._prefill(reader, session, samples)
                await self._until_quiet()
            async with self._reader(self._transport) as reader, self._state(reader, session) as state:
                view = await state.view(session.ref())
                for index in range(_NUM_WARMUP_ROUNDS + config.repeats):
                    if index == _NUM_WARMUP_ROUNDS:
                        samples.round_ns, samples.round_bytes, samples.read_ns = [], [], []
                    view = await self._round(session, state, samples, view.length)
                if self._need.projection is None:
                    samples.num_compared_bytes = await self._compare(session, view)
        await self._until_quiet()
        return samples

    async def _prefill(self, reader: StateReader, session: VerifySession, samples: _Samples) -> None:
        """Time the first views of two sessions of a new reader."""
        for times in (samples.prefill_ns, samples.again_ns):
            async with self._state(reader, session) as state:
                started_ns = time.perf_counter_ns()
                await state.view(session.ref())
                times.append(time.perf_counter_ns() - started_ns)
                samples.prefill_bytes = state.take_num_new_bytes()

    async def _round(
        self, session: VerifySession, state: StateSession, samples: _Samples, length: int
    ) -> TargetStateView:
        """Time a round; before it the state was readable up to `length`."""
        from specdec.state.view import tensor_bytes

        state.take_num_new_bytes()
        result = await session.round()
        answered_ns = time.perf_counter_ns()
        view = await state.view(TargetStateRef.from_proto(result.target_state))
        viewed_ns = time.perf_counter_ns()
        for name in self._names(session):
            tensor_bytes(view.rows(name, max(length, view.first_row(name))))
        read_ns = time.perf_counter_ns()
        samples.round_ns.append(viewed_ns - answered_ns)
        samples.round_bytes.append(state.take_num_new_bytes())
        samples.read_ns.append(read_ns - viewed_ns)
        return view

    async def _compare(self, session: VerifySession, view: TargetStateView) -> int:
        """Compare a view with that of the other transport, and return the number of bytes.

        Raises:
            InternalError: the bytes differ.
        """
        from specdec.state.view import tensor_bytes

        other_transport = STREAM if self._transport == HANDLE else HANDLE
        num_bytes = 0
        async with self._reader(other_transport) as reader, self._state(reader, session) as state:
            other = await state.view(session.ref(view.length))
            for name in self._names(session):
                data = tensor_bytes(view.rows(name))
                if data != tensor_bytes(other.rows(name)):
                    raise InternalError(f"Handle and stream gave different data of {name}.")
                num_bytes += len(data)
        return num_bytes

    def _names(self, session: VerifySession) -> list[str]:
        """Return the names of the tensors in a view."""
        if self._need.projection is not None:
            return [PROJECTED]
        return [ref.name for ref in session.opened.tensors if ref.name != GENERATIONS]

    @asynccontextmanager
    async def _verify(self, config: TransportConfig) -> AsyncIterator[VerifySession]:
        num_rounds = config.repeats + _NUM_WARMUP_ROUNDS
        call = self._stub.Verify()
        try:
            yield await VerifySession.open(
                call,
                self._need.spec,
                model=config.model,
                prefill_tokens=config.prefill_tokens,
                round_tokens=config.round_tokens,
                num_rounds=num_rounds,
            )
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        finally:
            call.cancel()

    @asynccontextmanager
    async def _reader(self, transport: str) -> AsyncIterator[StateReader]:
        import torch

        from specdec.runtime.state_files import SharedDirectory
        from specdec.state.reader import ReaderConfig, StateReader

        directory = SharedDirectory(Path(self._config.shared_dir)) if transport == HANDLE else None
        device = torch.device(self._config.device)
        reader = StateReader(ReaderConfig(transport, device, directory, _MIRROR_BYTES))
        try:
            yield reader
        finally:
            await reader.close()

    @asynccontextmanager
    async def _state(self, reader: StateReader, session: VerifySession) -> AsyncIterator[StateSession]:
        state = reader.open(self._need.spec, session.max_length, self._need.projection)
        try:
            yield state
        finally:
            await state.close()

    async def _until_quiet(self) -> None:
        """Wait until the verifier has ended the streams that were left, so that the next is timed while it is
        idle.

        Raises:
            UnavailableError: the streams do not end, or others use the verifier.
        """
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        request = verifier_pb2.VerifierServiceGetInfoRequest()
        while (await self._stub.GetInfo(request)).num_state_streams:
            if time.monotonic() > deadline:
                raise UnavailableError("The verifier is not idle: it streams target state to others.")
            await asyncio.sleep(_QUIET_POLL_S)


def _row(model: str, need: Need, transport: str, config: TransportConfig, samples: _Samples) -> TransportRow:
    return TransportRow(
        model=model,
        state=need.name,
        transport=transport,
        bytes_per_token=samples.prefill_bytes // config.prefill_tokens,
        bytes_per_round=round(median(samples.round_bytes)),
        round_us_p50=median(samples.round_ns) / 1e3,
        round_us_p90=percentile(samples.round_ns, 0.9) / 1e3,
        read_us_p50=median(samples.read_ns) / 1e3,
        prefill_bytes=samples.prefill_bytes,
        prefill_ms_p50=median(samples.prefill_ns) / 1e6,
        again_ms_p50=median(samples.again_ns) / 1e6,
        num_rounds=len(samples.round_ns),
        num_compared_bytes=samples.num_compared_bytes,
    )


def percentile(values: Sequence[int], share: float) -> int:
    """Return the least value that at least `share` of the values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
