"""A drafter that reads target state and keeps copies of all it read, for comparison."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem, DraftSession, OpenDraft
from drafter_service.drafters.ngram.drafter import NgramSession
from drafter_service.families import FAMILIES, DrafterFactory
from specdec.contract.draft_tree import DraftTree
from specdec.contract.target_state import (
    StateStorage,
    TargetStateRef,
    TargetStateSpec,
    hidden_name,
    key_name,
    value_name,
)
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.state_files import SharedDirectory
from specdec.state.reader import ReaderConfig, StateReader
from specdec.state.view import Projection, TargetStateView
from specdec.v1 import verifier_pb2
from tests.raw_streams import VerifyStream, output_of, verify_stream
from tests.trees import random_tree


@dataclass
class Reading:
    """What a round saw: rows by tensor name, positions below `length`."""

    length: int
    tensors: dict[str, Tensor]
    first: Mapping[str, int] = field(default_factory=dict)
    """The first position of tensors that have the last ones only."""

    def since(self, name: str, position: int) -> Tensor:
        """Return a tensor's rows from a position on, as far as there are such."""
        return self.tensors[name][max(0, position - self.first.get(name, 0)) :]


class ProbeSession(NgramSession):
    """Drafts by n-grams, so that rounds have drafts, some right and some wrong."""

    def __init__(self, request: OpenDraft) -> None:
        super().__init__(request, range(1, 3))
        self.readings: list[Reading] = []
        self.storages: set[StateStorage] = set()


@dataclass
class StateProbe(Drafter):
    """Reads everything its spec names, each round anew."""

    spec: TargetStateSpec
    projection: Projection | None = None
    needs_weights: bool = False
    name: str = "probe"
    after_reading: Callable[[ProbeSession], None] = lambda session: None
    """Called on the engine thread when a round has read its state: may hold the round."""
    expected: Sequence[int] = ()
    """The output, if it is known: drafts are right up to some point then. Else they are made by n-grams."""
    sessions: list[ProbeSession] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.traits = DrafterTraits(
            self.name, "probe", 8, 4, target_state_spec=self.spec, needs_target_weights=self.needs_weights
        )

    @property
    def families(self) -> Mapping[str, DrafterFactory]:
        """Drafter families with this one."""
        return {**FAMILIES, self.name: lambda spec, config: self}

    def open(self, request: OpenDraft) -> DraftSession:
        session = ProbeSession(request)
        self.sessions.append(session)
        return session

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        drafts = []
        for item in items:
            session = item.session
            assert isinstance(session, ProbeSession)
            assert session.view is not None
            assert session.state is not None
            assert session.state.link is not None
            session.readings.append(read_all(session.view))
            session.storages.add(session.state.link.storage)
            self.after_reading(session)
            drafts.append(self._draft(session, item.draft_depth))
        return drafts

    def _draft(self, session: ProbeSession, num_tokens: int) -> list[int]:
        if not self.expected:
            return session.propose(num_tokens)
        done = len(session.token_ids) - session.prompt_length
        num_right = len(session.readings) % (num_tokens + 1)
        return partly_right(self.expected[done : done + num_tokens], num_right)


def partly_right(expected: Sequence[int], num_right: int) -> list[int]:
    """Return a draft of which the target will accept `num_right` tokens."""
    return [*expected[:num_right], *((token + 1) % 256 for token in expected[num_right:])]


def read_all(view: TargetStateView) -> Reading:
    """Copy every tensor that a drafter may read."""
    tensors: dict[str, Tensor] = {}
    if view.spec.projection:
        tensors["projected"] = view.projected().clone()
    else:
        tensors |= {hidden_name(layer): view.hidden(layer).clone() for layer in view.spec.hidden_layer_ids}
    if view.spec.last_hidden_state:
        tensors["last_hidden"] = view.last_hidden().clone()
    layers = set(view.spec.kv_layer_ids)
    if view.spec.kv_last_of_each_attention_type:
        layers |= {view.last_layer_of(kind) for kind in view.attention_types}
    for layer in sorted(layers):
        keys, values = view.kv(layer)
        tensors |= {key_name(layer): keys.clone(), value_name(layer): values.clone()}
    first = {name: view.first_row(name) for name in tensors if view.first_row(name)}
    return Reading(view.length, tensors, first)


def random_projection(num_layers: int, hidden_size: int, output_size: int, dtype: torch.dtype) -> Projection:
    """Return a projection with random weights, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    fc = torch.randn(output_size, num_layers * hidden_size, generator=generator) * hidden_size**-0.5
    norm = torch.rand(output_size, generator=generator) + 0.5
    return Projection(fc.to(dtype), norm.to(dtype), 1e-6)


def all_of(family: str) -> TargetStateSpec:
    """Return a spec of everything a tiny model of a family can export."""
    kv_layers = (0, 1) if family == "gemma4-shared-kv" else (0, 1, 2, 3)
    return TargetStateSpec((0, 1, 2, 3), True, kv_layers, True)


@asynccontextmanager
async def state_reader(mode: str, shared_dir: Path, **options: Any) -> AsyncIterator[StateReader]:
    """Run a drafter's reader of target state without its drafter."""
    directory = None if mode == "stream" else SharedDirectory(shared_dir)
    config = {"mirror_bytes": 2**26, "stream_projected": False, **options}
    reader = StateReader(ReaderConfig(mode, torch.device("cpu"), directory, **config))
    try:
        yield reader
    finally:
        await reader.close()


def ref_of(result: verifier_pb2.VerifyResult) -> TargetStateRef:
    """Return the handle in an answer of the verifier."""
    assert result.HasField("target_state")
    return TargetStateRef.from_proto(result.target_state)


@asynccontextmanager
async def state_session(
    address: str, prompt: Sequence[int], spec: TargetStateSpec, *, max_new_tokens: int = 40
) -> AsyncIterator[tuple[VerifyStream, TargetStateRef]]:
    """Open and prefill a session that exports state; yield its stream and its first handle."""
    async with verify_stream(address) as stream:
        fields = {"max_new_tokens": max_new_tokens, "ignore_eos": True}
        first = await stream.open(prompt, target_state_spec=spec.to_proto(), **fields)
        assert stream.opened.target_state_refusal == ""
        yield stream, ref_of(first)


@dataclass
class Followed:
    """A session whose state was read in every round."""

    token_ids: list[int]
    readings: list[list[Reading]]
    """Per reader, per round, the prefill first."""
    num_refused: int
    num_accepted: int
    num_moved: int = 0
    """Rounds that accepted another path than the draft's first tokens."""


async def follow(
    address: str,
    prompt: Sequence[int],
    spec: TargetStateSpec,
    readers: Sequence[StateReader],
    *,
    projection: Projection | None = None,
    max_new_tokens: int = 40,
    with_trees: bool = False,
) -> Followed:
    """Run a whole session with drafts that are right up to some point; every reader reads every round."""
    expected = await output_of(address, prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
    max_length = len(prompt) + max_new_tokens
    sessions = [reader.open(spec, max_length, projection) for reader in readers]
    followed = Followed([], [[] for _ in readers], 0, 0)
    async with state_session(address, prompt, spec, max_new_tokens=max_new_tokens) as (stream, ref):
        for num_right in range(max_new_tokens):
            for session, readings in zip(sessions, followed.readings, strict=True):
                readings.append(read_all(await session.view(ref)))
                session.check()
                assert not session.is_behind
            done = len(stream.token_ids) - len(prompt)
            if done == max_new_tokens:
                break
            draft = partly_right(expected[done : done + 4], num_right % 5)
            tree = DraftTree.of(draft)
            if with_trees:
                tree = random_tree(Random(num_right), draft, num_wrong=12, vocab_size=256)
            result = await stream.round(tree.token_ids, parents=tree.parent_indices)
            ref = ref_of(result)
            followed.num_moved += bool(result.accepted_node_indices)
            followed.num_accepted += result.num_accepted_tokens
            followed.num_refused += len(draft) - result.num_accepted_tokens
        followed.token_ids = stream.token_ids
        assert stream.token_ids[len(prompt) :] == expected
    for session in sessions:
        await session.close()
    return followed


@contextmanager
def scattered(pool: KvPool) -> Iterator[None]:
    """Take every other block of a pool, so that no session finds two neighbouring blocks."""
    taken = [(group, group.take(group.num_available, 1)) for group in pool.groups.values()]
    for group, blocks in taken:
        group.leave(blocks[1::2])
    yield
    for group, blocks in taken:
        group.leave(blocks[::2])


def assert_same(reading: Reading, other: Reading) -> None:
    """Check that two inputs of a drafter are equal bit for bit."""
    assert reading.length == other.length
    assert reading.tensors.keys() == other.tensors.keys()
    assert reading.first == other.first
    for name, tensor in reading.tensors.items():
        assert len(tensor) == reading.length - reading.first.get(name, 0), name
        assert torch.equal(tensor, other.tensors[name]), name


def assert_never_changed(readings: Sequence[Reading]) -> None:
    """Check that every later round reads again, bit for bit, what was read once."""
    for earlier, later in pairwise(readings):
        assert earlier.length < later.length
        assert earlier.tensors.keys() == later.tensors.keys()
        for name, tensor in later.tensors.items():
            first = later.first.get(name, 0)
            again = tensor[: max(0, earlier.length - first)]
            assert torch.equal(earlier.since(name, first), again), name
