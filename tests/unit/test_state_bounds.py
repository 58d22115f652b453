"""What a broken or hostile peer says must not cost memory, descriptors or channels for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.contract.errors import FailedPreconditionError, ResourceExhaustedError, UnavailableError
from specdec.contract.target_state import SharedMemory, TargetStateRef, TargetStateSpec, TensorRef
from specdec.runtime.memory import SharedHostMemory
from specdec.runtime.state_files import SharedDirectory
from specdec.state.mapped_file import MappedFile
from specdec.state.mirror import MirrorBudget, MirroredState
from specdec.state.reader import ReaderConfig, StateReader
from specdec.v1 import target_state_pb2 as pb

SPEC = TargetStateSpec(last_hidden_state=True)
CPU = torch.device("cpu")


def ref_of(*shape: int, num_blocks: int = 2) -> TargetStateRef:
    tensors = (TensorRef("last_hidden", "float32", shape),)
    return TargetStateRef("id", "127.0.0.1:1", 1, 0, tensors, tuple(range(num_blocks)), 64)


def at(length: int) -> TargetStateRef:
    """Return the handle on so many positions."""
    return replace(ref_of(1000, 8), cached_length=length)


def mirror(budget: MirrorBudget, ref: TargetStateRef, max_length: int, stub: Any = None) -> MirroredState:
    # Nothing is streamed before the first await.
    return MirroredState(
        stub, budget, ref, SPEC, max_length, device=CPU, timeout_s=20, projection=None, is_projected=False
    )


async def test_a_mirror_is_no_larger_than_the_session_whatever_the_gateway_says() -> None:
    budget = MirrorBudget(2**20)
    state = mirror(budget, ref_of(1000, 8), max_length=2**32 - 1)
    assert budget.num_used == 2 * 64 * 8 * 4
    await state.close()
    assert budget.num_used == 0


@pytest.mark.parametrize("extent", [2**20, 2**45])
async def test_a_mirror_that_cannot_be_made_takes_nothing(extent: int) -> None:
    budget = MirrorBudget(2**20 if extent == 2**20 else 2**60)
    with pytest.raises(ResourceExhaustedError):
        mirror(budget, ref_of(1000, extent), max_length=100)
    assert budget.num_used == 0


class Streaming:
    """A verifier that streams these chunks, as its stub."""

    def __init__(self, *chunks: pb.StreamTargetStateResponse) -> None:
        self._chunks = chunks

    async def StreamTargetState(  # noqa: N802
        self, _request: object, **_options: object
    ) -> AsyncIterator[pb.StreamTargetStateResponse]:
        for chunk in self._chunks:
            yield chunk
        await asyncio.Event().wait()


def chunk(
    start: int, num_positions: int, num_gone: int = 0, **num_bytes: int
) -> pb.StreamTargetStateResponse:
    """Return rows of 32 bytes, each full of the number of its first position, or so many bytes of each
    tensor.
    """
    sizes = num_bytes or {"last_hidden": 32 * (num_positions - num_gone)}
    rows = [
        pb.TensorRows(name=name, data=bytes([start]) * size, num_gone_positions=num_gone)
        for name, size in sizes.items()
    ]
    return pb.StreamTargetStateResponse(start_position=start, num_positions=num_positions, tensors=rows)


FIRST = chunk(0, 10)
WRONG_CHUNKS = {
    "again": chunk(0, 10),
    "from before": chunk(9, 10),
    "a gap": chunk(11, 10),
    "past the session's blocks": chunk(10, 119),
    "too few bytes": chunk(10, 1, last_hidden=31),
    "too many bytes": chunk(10, 1, last_hidden=33),
    "another tensor": chunk(10, 1, last=32),
    "one tensor more": chunk(10, 1, last_hidden=32, hidden=32),
    "fewer rows of what keeps all": chunk(10, 5, num_gone=2),
}


@pytest.mark.parametrize("wrong", WRONG_CHUNKS)
async def test_state_that_was_not_asked_for_is_not_stored(wrong: str) -> None:
    state = mirror(MirrorBudget(2**20), ref_of(1000, 8), 128, Streaming(FIRST, WRONG_CHUNKS[wrong]))
    with pytest.raises(UnavailableError) as raised:
        await asyncio.wait_for(state.view(at(128)), 10)
    assert raised.value.reason == "BAD_STATE"
    assert state.length == 10
    await state.close()


async def test_state_that_only_another_drafter_of_the_session_reads_is_not_mirrored() -> None:
    budget, ref = MirrorBudget(2**20), ref_of(1000, 8)
    both = replace(ref, tensors=(*ref.tensors, TensorRef("hidden.0", "float32", (1000, 8))))
    older_verifier = Streaming(chunk(0, 10, last_hidden=320, **{"hidden.0": 320}))
    state = mirror(budget, both, 128, older_verifier)
    assert budget.num_used == 128 * 32
    assert (await asyncio.wait_for(state.view(at(10)), 10)).last_hidden().shape == (10, 8)
    await state.close()


async def test_state_is_stored_to_the_last_position_of_the_sessions_blocks() -> None:
    state = mirror(MirrorBudget(2**20), ref_of(1000, 8), 128, Streaming(FIRST, chunk(10, 118)))
    view = await asyncio.wait_for(state.view(at(128)), 10)
    assert view.last_hidden().view(torch.uint8)[:, 0].tolist() == [0] * 10 + [10] * 118
    await state.close()


def num_descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_has_one_spelling_only(tmp_path: Path) -> None:
    directory = SharedDirectory(tmp_path)
    memory = SharedHostMemory(directory, strict=True)
    storage = memory.allocate(4096).storage
    assert isinstance(storage, SharedMemory)
    MappedFile(directory, storage.path).close()
    before = num_descriptors()
    name = Path(storage.path).name
    for spelling in (f"{directory.path}/./{name}", f"{directory.path}//{name}", f"{storage.path}\0"):
        with pytest.raises(FailedPreconditionError):
            MappedFile(directory, spelling)
    assert num_descriptors() == before
    memory.close()


def test_memory_that_was_closed_makes_no_more_files(tmp_path: Path) -> None:
    directory = SharedDirectory(tmp_path)
    memory = SharedHostMemory(directory, strict=False)
    memory.close()
    with pytest.raises(UnavailableError):
        memory.allocate(4096)
    assert not list(directory.path.iterdir())


async def test_idle_channels_are_closed_once_and_used_ones_are_kept() -> None:
    reader = StateReader(ReaderConfig("stream", CPU, None, mirror_bytes=2**20))
    sessions = [reader.open(SPEC, 64) for _ in range(20)]
    for index, session in enumerate(sessions):
        link, source = await reader.attach(
            TargetStateRef("id", f"127.0.0.1:{index + 1}", 1, 0, ref_of(9, 8).tensors, (0,), 64),
            SPEC,
            64,
            None,
        )
        session.link, session._source = link, source
    await asyncio.gather(*(session.close() for session in sessions[1:]))
    assert set(reader._verifiers.uris) >= {"127.0.0.1:1"}
    assert len(reader._verifiers.uris) < 20
    assert [link.verifier_uri for link, _ in reader.links] == ["127.0.0.1:1"]
    await sessions[0].close()
    await reader.close()
    assert reader.mirrors.num_used == 0
