"""What it costs a drafter to get at target state, by handle and by stream, per round and per prompt.

A real verifier is driven over gRPC, and its state is read by the code the drafter service reads it with.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
from rich.table import Table

from specdec.bench.provenance import collect
from specdec.contract.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    from_rpc_error,
)
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import GENERATIONS, PROJECTED, TargetStateRef, TargetStateSpec
from specdec.models.files import model_id, resolve_model
from specdec.transport.channel import aio_channel
from specdec.transport.handshake import make_handshake
from specdec.v1 import verifier_pb2, verifier_pb2_grpc

if TYPE_CHECKING:
    from specdec.state.reader import StateReader, StateSession
    from specdec.state.view import Projection, TargetStateView

RESULTS_FILE = "transport.json"
TABLE_FILE = "transport.md"
HANDLE, STREAM = "handle", "stream"
CAPTION = (
    "us/round: from the verifier's answer until the drafter's reader returned a view of the new positions. "
    "read us: copying their rows out of the view afterwards. ms/prefill: from the answer to the open until a "
    "new reader returned a view of the whole prompt: it maps the memory, or connects, opens the stream and "
    "receives. again ms: the same for a second session of that reader. Bytes are of state that became "
    "readable: by handle none is sent, by stream all, some of it while the answer is still under way."
)
"""What the columns of the table are."""

_NUM_DFLASH_LAYERS = 5
_FORCED_TOKEN = 3
"""The one token the target may pick: a draft of nothing else is accepted whole, in any data type."""
_NUM_WARMUP_ROUNDS = 5
_NUM_WARMUP_TOKENS = 64
"""Prompt of the unmeasured session before each measured one."""
_MIRROR_BYTES = 2**40
_QUIET_TIMEOUT_S = 10.0
_QUIET_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class TransportRow:
    """One kind of state of one model, one way to get at it. Sizes are of state that became readable."""

    model: str
    state: str
    """"MTP", "DFlash" or "DFlash projected"."""
    transport: str
    """"handle" or "stream"."""
    bytes_per_token: int
    bytes_per_round: int
    round_us_p50: float
    """Median time from the verifier's answer until a view of the new positions was there, microseconds."""
    round_us_p90: float
    """90th percentile of the same."""
    read_us_p50: float
    """Median time of copying the new positions' rows out of that view, microseconds."""
    prefill_bytes: int
    prefill_ms_p50: float
    """Median time until a new reader had a view of the whole prompt, milliseconds: it maps the memory, or
    connects, opens the stream and receives."""
    again_ms_p50: float
    """Median time of the same for a second session of that reader, milliseconds."""
    num_rounds: int
    """Rounds measured."""
    num_compared_bytes: int
    """Bytes found equal to those the other transport gave; 0 where there is no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """What is measured.

    Args:
        model: what the verifier runs: "default", a folder or a hub id.
        device: the verifier's and the reader's.
        shared_dir: where handles are.
        prefill_tokens: prompt length.
        round_tokens: new tokens per round, bonus included.
        prefills: first views per row, each by a new reader.
        repeats: measured rounds per row.
    """

    model: str
    device: str = "cpu"
    shared_dir: str = "/dev/shm"
    prefill_tokens: int = 1024
    round_tokens: int = 5
    prefills: int = 5
    repeats: int = 50


@dataclass(frozen=True, slots=True)
class _Need:
    """What one kind of drafter reads, and the ways to get at it."""

    name: str
    spec: TargetStateSpec
    transports: tuple[str, ...] = (HANDLE, STREAM)
    projection: Projection | None = None


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
    """All rows of one model.

    Args:
        verifier: address of a verifier of `config.model` on this host, with nothing else to do.
        on_progress: called with the rows done and the rows in all.

    Raises:
        SpecdecError: the verifier refused, or exports no state.
        InternalError: the two transports gave different data.
    """
    try:
        async with aio_channel(verifier) as channel:
            stub = verifier_pb2_grpc.VerifierServiceStub(channel)
            info = await stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest(), timeout=10)
            needs = _needs(*_dimensions(config.model), info.model.dtype)
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

    def __init__(self, stub: Any, config: TransportConfig, need: _Need, transport: str) -> None:
        self._stub = stub
        self._config = config
        self._need = need
        self._transport = transport

    async def run(self) -> _Samples:
        """Once unmeasured: memory is made, a projection is sent. Then in earnest."""
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

    async def _prefill(self, reader: StateReader, session: _Session, samples: _Samples) -> None:
        """Time the first views of two sessions of a new reader."""
        for times in (samples.prefill_ns, samples.again_ns):
            async with self._state(reader, session) as state:
                started_ns = time.perf_counter_ns()
                await state.view(session.ref())
                times.append(time.perf_counter_ns() - started_ns)
                samples.prefill_bytes = state.take_num_new_bytes()

    async def _round(
        self, session: _Session, state: StateSession, samples: _Samples, length: int
    ) -> TargetStateView:
        """One round; the state was readable up to `length` before."""
        from specdec.state.view import tensor_bytes

        state.take_num_new_bytes()
        result = await session.round()
        answered_ns = time.perf_counter_ns()
        view = await state.view(TargetStateRef.from_proto(result.target_state))
        viewed_ns = time.perf_counter_ns()
        for name in self._names(session):
            tensor_bytes(view.rows(name, length))
        read_ns = time.perf_counter_ns()
        samples.round_ns.append(viewed_ns - answered_ns)
        samples.round_bytes.append(state.take_num_new_bytes())
        samples.read_ns.append(read_ns - viewed_ns)
        return view

    async def _compare(self, session: _Session, view: TargetStateView) -> int:
        """Bytes of a view, all of which the other transport gives too.

        Raises:
            InternalError: it does not.
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

    def _names(self, session: _Session) -> list[str]:
        """Tensors a view has."""
        if self._need.projection is not None:
            return [PROJECTED]
        return [ref.name for ref in session.opened.tensors if ref.name != GENERATIONS]

    @asynccontextmanager
    async def _verify(self, config: TransportConfig) -> AsyncIterator[_Session]:
        num_rounds = config.repeats + _NUM_WARMUP_ROUNDS
        call = self._stub.Verify()
        try:
            yield await _Session.open(call, config, self._need.spec, num_rounds)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        finally:
            call.cancel()

    @asynccontextmanager
    async def _reader(self, transport: str) -> AsyncIterator[StateReader]:
        import torch

        from specdec.runtime.memory import SharedDirectory
        from specdec.state.reader import ReaderConfig, StateReader

        directory = SharedDirectory(Path(self._config.shared_dir)) if transport == HANDLE else None
        device = torch.device(self._config.device)
        reader = StateReader(ReaderConfig(transport, device, directory, _MIRROR_BYTES))
        try:
            yield reader
        finally:
            await reader.close()

    @asynccontextmanager
    async def _state(self, reader: StateReader, session: _Session) -> AsyncIterator[StateSession]:
        state = reader.open(self._need.spec, session.max_length, self._need.projection)
        try:
            yield state
        finally:
            await state.close()

    async def _until_quiet(self) -> None:
        """Wait until the verifier has noticed that streams were left: the next is timed on an idle one.

        Raises:
            UnavailableError: they do not end, or others use it.
        """
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        request = verifier_pb2.VerifierServiceGetInfoRequest()
        while (await self._stub.GetInfo(request)).num_state_streams:
            if time.monotonic() > deadline:
                raise UnavailableError("The verifier is not idle: it streams target state to others.")
            await asyncio.sleep(_QUIET_POLL_S)


class _Session:
    """One Verify stream in which every draft is accepted whole.

    Args:
        opened: the handle with its tensors.
        result: the answer to the open.
    """

    def __init__(
        self,
        call: Any,
        opened: Any,
        result: verifier_pb2.VerifyResult,
        max_length: int,
        num_draft_tokens: int,
    ) -> None:
        self.max_length = max_length
        self.opened = TargetStateRef.from_proto(opened)
        self._call = call
        self._message = opened
        self._committed_length = result.committed_length
        self._draft = [_FORCED_TOKEN] * num_draft_tokens

    @classmethod
    async def open(
        cls, call: Any, config: TransportConfig, spec: TargetStateSpec, num_rounds: int
    ) -> _Session:
        """Prefill a random prompt.

        Raises:
            FailedPreconditionError: the verifier exports no such state.
        """
        generator = random.Random(0)
        # One for the token that the prefill commits, one so that no round is the last.
        max_new_tokens = num_rounds * config.round_tokens + 2
        message = verifier_pb2.VerifyOpen(
            handshake=make_handshake(model_id(config.model)),
            committed_token_ids=[
                generator.randrange(_FORCED_TOKEN + 1, 256) for _ in range(config.prefill_tokens)
            ],
            sampling=SamplingParams(allowed_token_ids=(_FORCED_TOKEN,)).to_proto(),
            ignore_eos=True,
            max_new_tokens=max_new_tokens,
            target_state_spec=spec.to_proto(),
        )
        opened = (await _exchange(call, verifier_pb2.VerifyRequest(open=message))).opened
        if not opened.first.HasField("target_state"):
            raise FailedPreconditionError(
                f"The verifier exports no target state: {opened.target_state_refusal or 'no reason given'}",
                reason="NO_TARGET_STATE",
            )
        max_length = config.prefill_tokens + max_new_tokens
        first = opened.first
        return cls(call, first.target_state, first, max_length, config.round_tokens - 1)

    def ref(self, cached_length: int = 0) -> TargetStateRef:
        """The handle in the answer to the open, parsed anew; of `cached_length` if that is given."""
        ref = TargetStateRef.from_proto(self._message)
        return replace(ref, cached_length=cached_length) if cached_length else ref

    async def round(self) -> verifier_pb2.VerifyResult:
        """Verify a draft.

        Raises:
            InternalError: it was not accepted whole.
        """
        message = verifier_pb2.VerifyRound(
            base_committed_length=self._committed_length, draft_token_ids=self._draft
        )
        response = await _exchange(self._call, verifier_pb2.VerifyRequest(round=message))
        result: verifier_pb2.VerifyResult = response.result
        if result.num_accepted_tokens != len(self._draft):
            raise InternalError("The verifier refused the only tokens it was allowed to pick.")
        self._committed_length = result.committed_length
        return result


async def _exchange(call: Any, request: verifier_pb2.VerifyRequest) -> verifier_pb2.VerifyResponse:
    with suppress(asyncio.InvalidStateError):  # the call has ended; reading says why
        await call.write(request)
    response = await call.read()
    if response is grpc.aio.EOF:
        raise UnavailableError("The verifier ended the session.")
    result: verifier_pb2.VerifyResponse = response
    return result


def _dimensions(model: str) -> tuple[int, int]:
    """Number of layers and hidden size of a model."""
    config = json.loads((resolve_model(model, ("config.json",)) / "config.json").read_text())
    text_config = config.get("text_config", config)
    return text_config["num_hidden_layers"], text_config["hidden_size"]


def _needs(num_layers: int, hidden_size: int, dtype: str) -> list[_Need]:
    layer_ids = dflash_layers(num_layers)
    projection = _random_projection(len(layer_ids) * hidden_size, hidden_size, dtype)
    dflash = TargetStateSpec(hidden_layer_ids=layer_ids)
    mtp = TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True)
    projected = replace(dflash, projection=projection.info)
    return [
        _Need("MTP", mtp),
        _Need("DFlash", dflash),
        _Need("DFlash projected", projected, (STREAM,), projection),
    ]


def dflash_layers(num_layers: int) -> tuple[int, ...]:
    """Five layers, or as many as there are, spread evenly over all but the last.

    Raises:
        InvalidArgumentError: there is one layer only.
    """
    if num_layers < 2:
        raise InvalidArgumentError("The model has a single layer; DFlash drafters read others than the last.")
    last = num_layers - 2
    count = min(_NUM_DFLASH_LAYERS, last + 1)
    return tuple(round(index * last / max(1, count - 1)) for index in range(count))


def _random_projection(input_size: int, output_size: int, dtype: str) -> Projection:
    import torch

    from specdec.state.view import Projection

    generator, torch_dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    fc = torch.randn(output_size, input_size, generator=generator, dtype=torch_dtype)
    return Projection(fc.mul_(input_size**-0.5), torch.ones(output_size, dtype=torch_dtype), 1e-6)


def _row(model: str, need: _Need, transport: str, config: TransportConfig, samples: _Samples) -> TransportRow:
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
    """The least value that at least `share` of the values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def write(directory: Path, rows: Sequence[TransportRow], settings: dict[str, Any]) -> None:
    """Write transport.json, with provenance, and transport.md."""
    directory.mkdir(parents=True, exist_ok=True)
    result = {"provenance": collect() | settings, "rows": [asdict(row) for row in rows]}
    (directory / RESULTS_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (directory / TABLE_FILE).write_text(markdown(rows), encoding="utf-8")


_HEADS = (
    "model",
    "state",
    "transport",
    "B/token",
    "B/round",
    "us/round p50",
    "p90",
    "read us",
    "B/prefill",
    "ms/prefill",
    "again ms",
)
_NUM_TEXT_COLUMNS = 3


def _cells(row: TransportRow) -> list[str]:
    return [
        row.model,
        row.state,
        row.transport,
        str(row.bytes_per_token),
        str(row.bytes_per_round),
        f"{row.round_us_p50:.0f}",
        f"{row.round_us_p90:.0f}",
        f"{row.read_us_p50:.0f}",
        str(row.prefill_bytes),
        f"{row.prefill_ms_p50:.2f}",
        f"{row.again_ms_p50:.2f}",
    ]


def table(rows: Sequence[TransportRow], *, round_tokens: int, prefill_tokens: int) -> Table:
    """The rows as a table."""
    title = f"Target state: rounds of {round_tokens} new tokens, prefill of {prefill_tokens}"
    result = Table(title=title, caption=CAPTION, caption_justify="left")
    for index, head in enumerate(_HEADS):
        result.add_column(head, justify="left" if index < _NUM_TEXT_COLUMNS else "right")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[TransportRow]) -> str:
    """The rows as a Markdown table."""
    rules = ["---"] * _NUM_TEXT_COLUMNS + ["---:"] * (len(_HEADS) - _NUM_TEXT_COLUMNS)
    lines = [list(_HEADS), rules, *(_cells(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{CAPTION}\n"
