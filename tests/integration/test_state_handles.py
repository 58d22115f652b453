"""Handles that are stale, incomplete, mixed up or forged: what is not the session's is not read."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.contract.target_state import GENERATIONS, SharedMemory, StateStorage, TargetStateRef, TensorRef
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.state_files import SharedDirectory
from tests.raw_streams import DraftStream, VerifyStream, draft_stream, until
from tests.state_probe import (
    ProbeSession,
    StateProbe,
    all_of,
    assert_same,
    read_all,
    ref_of,
    state_reader,
    state_session,
)
from tests.systems import running_drafter, running_verifier
from verifier_service.server import VerifierServer

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SPEC = all_of("llama")
NUM_BLOCKS = 3
SMALL_POOL = {"kv_cache_mib": NUM_BLOCKS * BLOCK_TOKENS * 512 / 2**20}
"""Room for a few sessions of one block: the next one gets blocks that were another's."""


@dataclass(frozen=True)
class Pair:
    """A verifier, and a drafter that reads its state; the probe can be held in mid-round."""

    verifier_at: str
    verifier: VerifierServer
    drafter_at: str
    probe: StateProbe
    is_held: threading.Event
    may_go_on: threading.Event

    async def until_free(self) -> None:
        """Wait until no session holds any block of the pool."""
        verifier = self.verifier.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.pool.free_tokens == verifier.pool.capacity_tokens)

    async def until_stale(self) -> None:
        """Wait until the drafter knows that its session's target state is gone: a stream reports that a
        little later.
        """
        (session,) = self.probe.sessions
        state = session.state
        assert state is not None

        def is_stale() -> bool:
            try:
                state.check()
            except FailedPreconditionError:
                return True
            return False

        await until(is_stale)


@asynccontextmanager
async def a_pair(model: Path, shared_dir: Path, mode: str) -> AsyncIterator[Pair]:
    is_held, may_go_on = threading.Event(), threading.Event()
    may_go_on.set()

    def hold(_: ProbeSession) -> None:
        is_held.set()
        assert may_go_on.wait(20)

    probe = StateProbe(SPEC, after_reading=hold)
    here = {"shared_dir": str(shared_dir)}
    async with (
        running_verifier(model, **here, **SMALL_POOL) as (verifier_at, verifier),
        running_drafter("probe", families=probe.families, target_state=mode, **here) as (drafter_at, _),
    ):
        yield Pair(verifier_at, verifier, drafter_at, probe, is_held, may_go_on)


@asynccontextmanager
async def drafting(pair: Pair, committed: Sequence[int]) -> AsyncIterator[DraftStream]:
    async with draft_stream(pair.drafter_at) as stream:
        await stream.open("probe", committed)
        yield stream


async def a_round(stream: DraftStream, verify: VerifyStream, ref: TargetStateRef, num_new: int) -> list[int]:
    """Run the next round of a draft session whose verifier has committed `num_new` tokens since."""
    length = len(verify.token_ids)
    return await stream.round(verify.token_ids[length - num_new :], length, target_state=ref.to_proto())


@pytest.mark.parametrize("mode", ["handle", "stream"])
class TestStaleHandles:
    async def test_of_a_session_that_was_closed(self, mode: str, tiny_llama: Path, tmp_path: Path) -> None:
        async with a_pair(tiny_llama, tmp_path, mode) as pair:
            async with (
                state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref),
                drafting(pair, PROMPT) as draft,
            ):
                await a_round(draft, verify, ref, 1)
                later = ref_of(await verify.round())
                await verify.call.done_writing()
                await verify.call.code()
                await pair.until_free()
                await pair.until_stale()
                with pytest.raises(FailedPreconditionError) as raised:
                    await a_round(draft, verify, later, 1)
            assert raised.value.reason == "STALE_STATE"
            (session,) = pair.probe.sessions
            assert len(session.readings) == 1

    async def test_as_a_first_handle(self, mode: str, tiny_llama: Path, tmp_path: Path) -> None:
        async with a_pair(tiny_llama, tmp_path, mode) as pair:
            async with state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref):
                pass
            await pair.until_free()
            async with drafting(pair, PROMPT) as draft:
                with pytest.raises(FailedPreconditionError) as raised:
                    await a_round(draft, verify, ref, 1)
            assert raised.value.reason == "STALE_STATE"
            assert pair.probe.sessions[0].readings == []

    async def test_whose_blocks_are_anothers_by_now(
        self, mode: str, tiny_llama: Path, tmp_path: Path
    ) -> None:
        async with a_pair(tiny_llama, tmp_path, mode) as pair, drafting(pair, PROMPT) as draft:
            async with state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref):
                await a_round(draft, verify, ref, 1)
                later = ref_of(await verify.round())
            await pair.until_free()
            async with state_session(pair.verifier_at, PROMPT[::-1], SPEC) as (_, taken):
                assert taken.block_ids == ref.block_ids
                assert taken.generation != ref.generation
                with pytest.raises(FailedPreconditionError) as raised:
                    await a_round(draft, verify, later, 1)
            assert raised.value.reason == "STALE_STATE"

    @pytest.mark.parametrize("is_taken", [False, True], ids=["free", "taken"])
    async def test_in_the_middle_of_a_round(
        self, mode: str, is_taken: bool, tiny_llama: Path, tmp_path: Path
    ) -> None:
        async with a_pair(tiny_llama, tmp_path, mode) as pair, drafting(pair, PROMPT) as draft:
            async with state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref):
                pair.may_go_on.clear()
                held = asyncio.ensure_future(a_round(draft, verify, ref, 1))
                assert await asyncio.to_thread(pair.is_held.wait, 20)
            await pair.until_free()
            await pair.until_stale()
            if is_taken:
                async with state_session(pair.verifier_at, PROMPT[::-1], SPEC) as (_, taken):
                    assert taken.block_ids == ref.block_ids
                    pair.may_go_on.set()
                    with pytest.raises(FailedPreconditionError) as raised:
                        await held
            else:
                pair.may_go_on.set()
                with pytest.raises(FailedPreconditionError) as raised:
                    await held
            assert raised.value.reason == "STALE_STATE"

    async def test_of_another_session(self, mode: str, tiny_llama: Path, tmp_path: Path) -> None:
        async with (
            a_pair(tiny_llama, tmp_path, mode) as pair,
            drafting(pair, PROMPT) as draft,
            state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref),
            state_session(pair.verifier_at, PROMPT, SPEC) as (other, _),
        ):
            await a_round(draft, verify, ref, 1)
            wrong = ref_of(await other.round())
            await verify.round()
            assert wrong.cached_length == len(verify.token_ids) - 1
            with pytest.raises(FailedPreconditionError, match="another session") as raised:
                await a_round(draft, verify, wrong, 1)
            assert raised.value.reason == "STALE_STATE"


async def test_rounds_without_what_the_drafter_needs_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    async with (
        a_pair(tiny_llama, tmp_path, "auto") as pair,
        state_session(pair.verifier_at, PROMPT, SPEC) as (verify, ref),
    ):
        wrong: list[tuple[str, Any]] = [
            ("NO_TARGET_STATE", None),
            ("INCOMPLETE_HANDLE", ref.at(ref.cached_length)),
            ("INCOMPLETE_HANDLE", replace(ref, block_ids=())),
            ("INCOMPLETE_HANDLE", replace(ref, block_tokens=BLOCK_TOKENS // 2)),
            ("STALE_BASE", replace(ref, cached_length=ref.cached_length - 1)),
            ("STALE_BASE", replace(ref, cached_length=ref.cached_length + 1)),
            ("STALE_STATE", replace(ref, generation=ref.generation + 1)),
            ("STALE_STATE", replace(ref, generation=2**64 - 1)),
        ]
        for reason, forged in wrong:
            async with drafting(pair, PROMPT) as draft:
                with pytest.raises(FailedPreconditionError) as raised:
                    await draft.round(
                        verify.token_ids[-1:],
                        len(verify.token_ids),
                        target_state=forged.to_proto() if forged else None,
                    )
                assert raised.value.reason == reason
        assert not any(session.readings for session in pair.probe.sessions)
        async with drafting(pair, PROMPT) as draft:
            await a_round(draft, verify, ref, 1)
        assert len(pair.probe.sessions[-1].readings) == 1


def entries(folder: Path) -> list[Path]:
    """Return everything in a folder."""
    return list(folder.iterdir())


async def test_files_are_for_this_user_alone_and_cannot_be_guessed(tiny_llama: Path, tmp_path: Path) -> None:
    names: set[str] = set()
    for _ in range(2):
        async with (
            running_verifier(tiny_llama, shared_dir=str(tmp_path)) as (address, _),
            state_session(address, PROMPT, SPEC) as (_, ref),
        ):
            (folder,) = entries(tmp_path)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            files = entries(folder)
            assert {Path(tensor.storage.path) for tensor in ref.tensors} == set(files)  # type: ignore[union-attr]
            for file in files:
                assert stat.S_IMODE(file.lstat().st_mode) == 0o600
                assert stat.S_ISREG(file.lstat().st_mode)
                assert len(bytes.fromhex(file.name.removesuffix(".state"))) == 16
            assert not names & {file.name for file in files}
            names |= {file.name for file in files}
            ids = {ref.session_id}
            async with state_session(address, PROMPT, SPEC) as (_, other):
                ids.add(other.session_id)
            assert len(ids) == 2
            assert {len(bytes.fromhex(name)) for name in ids} == {16}
        assert entries(folder) == []


Forge = Callable[[TargetStateRef, Path], TargetStateRef]


def moved(ref: TargetStateRef, **changes: Any) -> TargetStateRef:
    """Return a handle that claims another place for every tensor but the generations."""
    return changed(ref, lambda tensor: replace(tensor, storage=replace(tensor.storage, **changes)))


def changed(ref: TargetStateRef, change: Callable[[TensorRef], TensorRef]) -> TargetStateRef:
    return replace(ref, tensors=tuple(t if t.name == GENERATIONS else change(t) for t in ref.tensors))


def real_path(ref: TargetStateRef) -> Path:
    storage = ref.tensors[1].storage
    assert isinstance(storage, SharedMemory)
    return Path(storage.path)


def outside(ref: TargetStateRef, folder: Path) -> TargetStateRef:
    copy = folder.parent / "copy.state"
    copy.write_bytes(real_path(ref).read_bytes())
    return moved(ref, path=str(copy))


def by_way_of_the_parent(ref: TargetStateRef, folder: Path) -> TargetStateRef:
    outside(ref, folder)
    return moved(ref, path=str(folder / ".." / "copy.state"))


def linked(ref: TargetStateRef, folder: Path) -> TargetStateRef:
    link = folder / "link.state"
    link.symlink_to(real_path(ref))
    return moved(ref, path=str(link))


def short(ref: TargetStateRef, _: Path) -> TargetStateRef:
    """Return a handle whose tensors claim to lie in the verifier's own file of generations, which is locked
    as it should be, but too short.
    """
    generations = ref.tensors[0].storage
    assert isinstance(generations, SharedMemory)
    return moved(ref, path=generations.path)


def fifo(ref: TargetStateRef, folder: Path) -> TargetStateRef:
    os.mkfifo(folder / "fifo.state")
    return moved(ref, path=str(folder / "fifo.state"))


FORGERIES: dict[str, tuple[Forge, str]] = {
    "outside": (outside, "not in this service's shared directory"),
    "outside by way of the parent": (by_way_of_the_parent, "not in this service's shared directory"),
    "symlink": (linked, "state file cannot be"),
    "too short": (short, "would lie outside the memory"),
    "fifo": (fifo, "neither this user's"),
    "folder": (lambda ref, folder: moved(ref, path=str(folder / ".")), "not in this service's"),
    "missing": (lambda ref, folder: moved(ref, path=str(folder / "gone.state")), "state file cannot be"),
    "another host": (lambda ref, _: moved(ref, boot_id="another"), "another host"),
    "offset past the end": (lambda ref, _: moved(ref, offset=2**40), "would lie outside the memory"),
    "offset near 2**64": (lambda ref, _: moved(ref, offset=2**64 - 4), "would lie outside the memory"),
    "offset between elements": (lambda ref, _: moved(ref, offset=2), "would lie outside the memory"),
    "unknown dtype": (lambda ref, _: changed(ref, lambda t: replace(t, dtype="int129")), "element type"),
    "no dtype": (lambda ref, _: changed(ref, lambda t: replace(t, dtype="nn")), "element type"),
    "huge": (lambda ref, _: changed(ref, lambda t: replace(t, shape=(2**62, 2**62))), "would lie outside"),
    "no rows": (lambda ref, _: changed(ref, lambda t: replace(t, shape=(0, 8))), "no rows"),
    "no shape": (lambda ref, _: changed(ref, lambda t: replace(t, shape=())), "no rows"),
    "absurd blocks": (lambda ref, _: replace(ref, block_ids=(2**32 - 1,)), "blocks the pool lacks"),
    "one block too far": (lambda ref, _: replace(ref, block_ids=(NUM_BLOCKS,)), "blocks the pool lacks"),
    "no generations": (lambda ref, _: replace(ref, tensors=ref.tensors[1:]), "no generations"),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_forged_handles_are_never_read(
    name: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forge, fragment = FORGERIES[name]
    async with (
        running_verifier(tiny_llama, shared_dir=str(tmp_path), **SMALL_POOL) as (address, _),
        state_session(address, PROMPT, SPEC) as (_, ref),
        state_reader("handle", tmp_path) as strict,
        state_reader("auto", tmp_path) as lenient,
        state_reader("auto", tmp_path) as right,
    ):
        forged = forge(ref, tmp_path / f"specdec-{os.getuid()}")
        with pytest.raises(FailedPreconditionError, match=fragment) as raised:
            await strict.open(SPEC, 48).view(forged)
        assert raised.value.reason == "STATE_NOT_MAPPED"
        assert strict.links == []

        if [mirrored(tensor) for tensor in forged.tensors if tensor.name != GENERATIONS] != [
            mirrored(tensor) for tensor in ref.tensors if tensor.name != GENERATIONS
        ]:
            # Nobody knows what to make of such rows.
            with pytest.raises((FailedPreconditionError, ResourceExhaustedError, UnavailableError)):
                await asyncio.wait_for(lenient.open(SPEC, 48).view(forged), 10)
            return
        expected, session = right.open(SPEC, 48), lenient.open(SPEC, 48)
        view = await asyncio.wait_for(session.view(forged), 10)
        ((link, _),) = lenient.links
        assert link.storage is StateStorage.STREAM
        assert fragment in link.fallback_reason
        assert_same(read_all(view), read_all(await expected.view(ref)))
        assert name == "another host" or "target state is streamed" in caplog.text
        await session.close()
        await expected.close()


async def test_a_length_past_the_sessions_blocks_is_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    async with (
        running_verifier(tiny_llama, shared_dir=str(tmp_path), **SMALL_POOL) as (address, _),
        state_session(address, PROMPT, SPEC) as (_, ref),
        state_reader("handle", tmp_path) as reader,
    ):
        session = reader.open(SPEC, 2**31)
        last = len(ref.block_ids) * BLOCK_TOKENS
        assert (await session.view(replace(ref, cached_length=last))).length == last
        for length in (last + 1, last + BLOCK_TOKENS, 2**31):
            with pytest.raises(InvalidArgumentError, match="past its blocks"):
                await session.view(replace(ref, cached_length=length))
        await session.close()


def mirrored(tensor: TensorRef) -> tuple[str, str, tuple[int, ...]]:
    """Return what a mirror needs to know of a tensor."""
    return tensor.name, tensor.dtype, tensor.shape[1:]


def test_a_lock_alone_makes_a_file_a_verifiers(tmp_path: Path) -> None:
    directory = SharedDirectory(tmp_path)
    descriptor, path = directory.create(4096)
    assert directory.sweep() == 0
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    assert directory.sweep() == 1
    assert not path.exists()
    os.close(descriptor)
