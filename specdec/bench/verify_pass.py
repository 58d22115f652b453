"""What a verify pass costs against the tokens in it, measured through the verifier's own stream."""

from __future__ import annotations

import json
import queue
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.table import Table

from specdec.bench.provenance import collect
from specdec.channel import sync_channel
from specdec.errors import from_rpc_error
from specdec.handshake import make_handshake
from specdec.v1 import verifier_pb2, verifier_pb2_grpc

RESULTS_FILE = "pass.json"
_NUM_WARMUP_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class PassRow:
    """Cost of a pass with `num_tokens` tokens: the anchor and num_tokens - 1 draft tokens."""

    num_tokens: int
    compute_ms_p50: float
    """Median time of the engine step, picks included, milliseconds."""
    total_ms_p50: float
    """Median time of the round within the verifier, milliseconds."""
    round_trip_ms_p50: float
    """Median time of the round as the caller sees it, milliseconds."""
    relative_to_first: float
    """Median over the rounds of compute time over that of the first size, each in the same turn."""


def measure(
    verifier: str,
    *,
    sizes: Sequence[int],
    context_tokens: int,
    repeats: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PassRow]:
    """Send rounds of random drafts of each size in turn, so that drift hits all sizes alike.

    Args:
        verifier: address of a verifier with nothing else to do.
        sizes: tokens in a pass, each >= 1.
        context_tokens: prompt length, tokens; it grows by about a token per round.
        repeats: measured rounds per size.

    Raises:
        SpecdecError: the verifier refused.
    """
    generator = random.Random(0)
    samples: dict[int, list[tuple[int, int, int]]] = {size: [] for size in sizes}
    try:
        with sync_channel(verifier) as channel:
            stub = verifier_pb2_grpc.VerifierServiceStub(channel)
            info = stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest(), timeout=10)
            rounds = _Rounds(stub, info.model.vocab_size, generator)
            num_rounds = (repeats + _NUM_WARMUP_ROUNDS) * len(sizes)
            rounds.open(context_tokens, max_new_tokens=num_rounds * max(sizes))
            for index in range(repeats + _NUM_WARMUP_ROUNDS):
                for size in sizes:
                    sample = rounds.run(size - 1)
                    if index >= _NUM_WARMUP_ROUNDS:
                        samples[size].append(sample)
                on_progress(index + 1, repeats + _NUM_WARMUP_ROUNDS)
            rounds.close()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return _rows(samples, sizes)


class _Rounds:
    """One session, driven with drafts that are almost surely wrong."""

    def __init__(self, stub: Any, vocab_size: int, generator: random.Random) -> None:
        self._stub = stub
        self._vocab_size = vocab_size
        self._generator = generator
        self._committed_length = 0

    def open(self, num_tokens: int, *, max_new_tokens: int) -> None:
        self._requests: queue.SimpleQueue[verifier_pb2.VerifyRequest | None] = queue.SimpleQueue()
        self._responses = self._stub.Verify(iter(self._requests.get, None))
        message = verifier_pb2.VerifyOpen(
            handshake=make_handshake(),
            prompt_token_ids=self._tokens(num_tokens),
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
        )
        response, _ = self._exchange(verifier_pb2.VerifyRequest(open=message))
        self._committed_length = response.opened.first.committed_length

    def run(self, num_draft_tokens: int) -> tuple[int, int, int]:
        """Compute, total and round-trip time of one round, nanoseconds."""
        message = verifier_pb2.VerifyRound(
            base_committed_length=self._committed_length, draft_token_ids=self._tokens(num_draft_tokens)
        )
        response, elapsed_ns = self._exchange(verifier_pb2.VerifyRequest(round=message))
        self._committed_length = response.result.committed_length
        timings = response.result.timings
        return timings.compute_ns, timings.total_ns, elapsed_ns

    def close(self) -> None:
        self._requests.put(None)
        for _ in self._responses:
            pass

    def _exchange(self, request: verifier_pb2.VerifyRequest) -> tuple[verifier_pb2.VerifyResponse, int]:
        started_ns = time.monotonic_ns()
        self._requests.put(request)
        return next(self._responses), time.monotonic_ns() - started_ns

    def _tokens(self, count: int) -> list[int]:
        return [self._generator.randrange(self._vocab_size) for _ in range(count)]


def _rows(samples: dict[int, list[tuple[int, int, int]]], sizes: Sequence[int]) -> list[PassRow]:
    base = [compute for compute, _, _ in samples[sizes[0]]]
    rows = []
    for size in sizes:
        compute, total, round_trip = zip(*samples[size], strict=True)
        ratios = [mine / first for mine, first in zip(compute, base, strict=True)]
        rows.append(
            PassRow(
                size,
                statistics.median(compute) / 1e6,
                statistics.median(total) / 1e6,
                statistics.median(round_trip) / 1e6,
                statistics.median(ratios),
            )
        )
    return rows


def write(directory: Path, rows: Sequence[PassRow], settings: dict[str, Any]) -> None:
    """Write pass.json, with provenance."""
    directory.mkdir(parents=True, exist_ok=True)
    result = {"provenance": collect() | settings, "rows": [asdict(row) for row in rows]}
    (directory / RESULTS_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(rows: Sequence[PassRow]) -> Table:
    """The rows as a table."""
    result = Table(title="Cost of a verify pass")
    base = f"x {rows[0].num_tokens} token"
    for column in ("tokens", "engine step ms", "verifier ms", "round trip ms", base):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            str(row.num_tokens),
            f"{row.compute_ms_p50:.2f}",
            f"{row.total_ms_p50:.2f}",
            f"{row.round_trip_ms_p50:.2f}",
            f"{row.relative_to_first:.2f}",
        )
    return result
