"""Measures what a verify pass costs against the tokens in it, through the verifier's own stream.

Peers run passes of the same sizes, each in another process over its own cache. They take turns with the
verifier: none computes while another does.
"""

from __future__ import annotations

import json
import queue
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from rich.table import Table

from specdec.bench import plots
from specdec.bench.peers.engines import PeerTarget
from specdec.bench.peers.passes import PeerPasses
from specdec.bench.provenance import collect
from specdec.contract.errors import from_rpc_error
from specdec.models.embedded import DEFAULT_MODEL
from specdec.transport.channel import sync_channel
from specdec.transport.handshake import make_handshake
from specdec.v1 import verifier_pb2, verifier_pb2_grpc

RESULTS_FILE = "pass.json"
FIGURE_FILE = "pass.png"
CHAIN, TREE = "chain", "tree"
_LEAST_TREE_TOKENS = 3
"""The anchor and two children: a smaller tree has no branches."""
_NUM_WARMUP_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class PassRow:
    """Cost of a pass with `num_tokens` tokens: the anchor and num_tokens - 1 draft tokens."""

    num_tokens: int
    """Number of tokens in the pass."""
    compute_ms_p50: float
    """Median time of the engine step, picks included, milliseconds."""
    total_ms_p50: float
    """Median time of the round within the verifier, milliseconds."""
    round_trip_ms_p50: float
    """Median time of the round as the caller sees it, milliseconds."""
    relative_to_first: float
    """Median over the rounds of compute time over that of the first size, each in the same turn."""
    peer_ms_p50: dict[str, float] = field(default_factory=dict)
    """Median time of each peer's forward pass and arg max, milliseconds, by the peer's name."""
    relative_to_peer: dict[str, float] = field(default_factory=dict)
    """Median over the rounds of compute time over each peer's time, each in the same turn."""
    shape: str = CHAIN
    """Shape of the draft: CHAIN, or TREE for a random tree."""


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Times of one round, nanoseconds."""

    compute_ns: int
    """Time of the engine step."""
    total_ns: int
    """Time within the verifier."""
    round_trip_ns: int
    """Time that the caller sees."""
    peer_ns: dict[str, int] = field(default_factory=dict)
    """Time of each peer's pass."""


@dataclass(frozen=True, slots=True)
class PassFigures:
    """What was measured."""

    rows: list[PassRow]
    """Figures by size and shape."""
    peers: dict[str, Any]
    """What each peer says of itself."""


def measure(
    verifier: str,
    *,
    sizes: Sequence[int],
    context_tokens: int,
    repeats: int,
    model: str = DEFAULT_MODEL,
    peers: Sequence[str] = (),
    with_trees: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None,
) -> PassFigures:
    """Send rounds of random drafts of each size in turn, so that drift affects all sizes alike.

    Args:
        verifier: address of an idle verifier.
        sizes: numbers of tokens in a pass, each >= 1.
        context_tokens: length of the prompt, tokens; it grows by about a token per round.
        repeats: number of measured rounds for each size.
        model: the verifier's model, as its command line names it, for the peers to run as well.
        peers: engines that take turns with the verifier.
        with_trees: whether each size is measured as a random tree as well.
        on_progress: called with the number of turns done and of all turns.
        report: receives a line of text before a slow step.

    Raises:
        SpecdecError: the verifier refused, runs another model than the peers, or a peer failed.
    """
    generator = random.Random(0)
    drafts = [(size, CHAIN) for size in sizes]
    if with_trees:
        drafts += [(size, TREE) for size in sizes if size >= _LEAST_TREE_TOKENS]
    samples: dict[tuple[int, str], list[RoundTimes]] = {draft: [] for draft in drafts}
    try:
        with ExitStack() as stack:
            channel = stack.enter_context(sync_channel(verifier))
            stub = verifier_pb2_grpc.VerifierServiceStub(channel)
            info = stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest(), timeout=10)
            target = PeerTarget(model, info.model.model_id, info.model.dtype, info.model.device)
            passes = stack.enter_context(PeerPasses(target, peers, report))
            rounds = _Rounds(stub, info.model.vocab_size, generator)
            num_rounds = (repeats + _NUM_WARMUP_ROUNDS) * len(drafts)
            rounds.open(context_tokens, max_new_tokens=num_rounds * max(sizes), draft_nodes=max(sizes))
            passes.fill_caches(rounds.tokens(context_tokens))
            for index in range(repeats + _NUM_WARMUP_ROUNDS):
                for size, shape in drafts:
                    sample = _take_turns(index, rounds, passes, size, shape)
                    if index >= _NUM_WARMUP_ROUNDS:
                        samples[size, shape].append(sample)
                on_progress(index + 1, repeats + _NUM_WARMUP_ROUNDS)
            rounds.close()
            described = passes.descriptions()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return PassFigures(_rows(samples), described)


def _take_turns(index: int, rounds: _Rounds, passes: PeerPasses, size: int, shape: str) -> RoundTimes:
    """Run a round and a pass of every peer.

    Each goes first equally often, for what ran last has its data in the processor's caches.
    """
    own = RoundTimes(0, 0, 0)
    peer_ns: dict[str, int] = {}
    order = ["", *passes.names]
    start = index % len(order)
    for name in order[start:] + order[:start]:
        if name:
            peer_ns[name] = passes.run(name, rounds.tokens(size))
        else:
            own = rounds.run(size - 1, shape)
    return replace(own, peer_ns={name: peer_ns[name] for name in passes.names})


class _Rounds:
    """A session that is driven with drafts that are almost surely wrong."""

    def __init__(self, stub: Any, vocab_size: int, generator: random.Random) -> None:
        self._stub = stub
        self._vocab_size = vocab_size
        self._generator = generator
        self._committed_length = 0

    def open(self, num_tokens: int, *, max_new_tokens: int, draft_nodes: int) -> None:
        self._requests: queue.SimpleQueue[verifier_pb2.VerifyRequest | None] = queue.SimpleQueue()
        self._responses = self._stub.Verify(iter(self._requests.get, None))
        message = verifier_pb2.VerifyOpen(
            handshake=make_handshake(),
            committed_token_ids=self.tokens(num_tokens),
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
            draft_nodes=draft_nodes,
        )
        response, _ = self._exchange(verifier_pb2.VerifyRequest(open=message))
        self._committed_length = response.opened.first.committed_length

    def run(self, num_draft_tokens: int, shape: str) -> RoundTimes:
        """Run and time a round."""
        parents: Sequence[int] = ()
        if shape == TREE:
            # Any earlier node may be the parent: about half of the nodes are leaves.
            parents = [self._generator.randrange(-1, index) for index in range(num_draft_tokens)]
        message = verifier_pb2.VerifyRound(
            base_committed_length=self._committed_length,
            # All tokens differ, since siblings must.
            draft_token_ids=self._generator.sample(range(self._vocab_size), num_draft_tokens),
            parent_indices=parents,
        )
        response, elapsed_ns = self._exchange(verifier_pb2.VerifyRequest(round=message))
        self._committed_length = response.result.committed_length
        timings = response.result.timings
        return RoundTimes(timings.compute_ns, timings.total_ns, elapsed_ns)

    def close(self) -> None:
        self._requests.put(None)
        for _ in self._responses:
            pass

    def _exchange(self, request: verifier_pb2.VerifyRequest) -> tuple[verifier_pb2.VerifyResponse, int]:
        started_ns = time.monotonic_ns()
        self._requests.put(request)
        return next(self._responses), time.monotonic_ns() - started_ns

    def tokens(self, count: int) -> list[int]:
        """Return random token ids."""
        return [self._generator.randrange(self._vocab_size) for _ in range(count)]


def _rows(samples: dict[tuple[int, str], list[RoundTimes]]) -> list[PassRow]:
    first = next(iter(samples.values()))
    return [_row(size, shape, own, first) for (size, shape), own in samples.items()]


def _row(size: int, shape: str, own: Sequence[RoundTimes], first: Sequence[RoundTimes]) -> PassRow:
    peers = own[0].peer_ns
    return PassRow(
        size,
        statistics.median(sample.compute_ns for sample in own) / 1e6,
        statistics.median(sample.total_ns for sample in own) / 1e6,
        statistics.median(sample.round_trip_ns for sample in own) / 1e6,
        statistics.median(a.compute_ns / b.compute_ns for a, b in zip(own, first, strict=True)),
        {peer: statistics.median(sample.peer_ns[peer] for sample in own) / 1e6 for peer in peers},
        {peer: statistics.median(s.compute_ns / s.peer_ns[peer] for s in own) for peer in peers},
        shape,
    )


def write(directory: Path, rows: Sequence[PassRow], settings: dict[str, Any]) -> None:
    """Write pass.json with provenance, and pass.png where matplotlib is installed."""
    directory.mkdir(parents=True, exist_ok=True)
    result = {"provenance": collect() | settings, "rows": [asdict(row) for row in rows]}
    (directory / RESULTS_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plots.has_matplotlib():
        _draw(rows, directory / FIGURE_FILE)


def _draw(rows: Sequence[PassRow], path: Path) -> None:
    figure, axes = plots.new_figure(width_in=6.0)
    for shape in dict.fromkeys(row.shape for row in rows):
        points = [(row.num_tokens, row.relative_to_first) for row in rows if row.shape == shape]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=shape)
    axes.set_xlabel("tokens in the pass")
    axes.set_ylabel(f"cost over a pass of {rows[0].num_tokens}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


def table(rows: Sequence[PassRow]) -> Table:
    """Return the rows as a table."""
    result = Table(title="Cost of a verify pass")
    base = f"x {rows[0].num_tokens} token"
    peers = list(rows[0].peer_ms_p50)
    peer_columns = [head for peer in peers for head in (f"{peer} ms", f"step x {peer}")]
    for column in ("tokens", "draft", "engine step ms", "verifier ms", "round trip ms", base, *peer_columns):
        result.add_column(column, justify="right")
    for row in rows:
        times = (row.compute_ms_p50, row.total_ms_p50, row.round_trip_ms_p50, row.relative_to_first)
        peer_times = [
            value for peer in peers for value in (row.peer_ms_p50[peer], row.relative_to_peer[peer])
        ]
        result.add_row(str(row.num_tokens), row.shape, *(f"{value:.2f}" for value in (*times, *peer_times)))
    return result
