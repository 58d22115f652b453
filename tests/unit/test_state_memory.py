"""Files that hold target state: who may map them, and when they go."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from specdec.contract.target_state import SharedMemory, StateStorage, TensorRef, boot_id
from specdec.runtime.memory import PrivateMemory, SharedDirectory, SharedHostMemory
from specdec.state.mapped_file import MappedFile, carve
from tests.leftovers import nothing_left
from tests.probe_service import ENV

REF = TensorRef("hidden.0", "float32", (4, 8))
NUM_BYTES = 4 * 8 * 4


@pytest.fixture
def directory(tmp_path: Path) -> SharedDirectory:
    return SharedDirectory(tmp_path)


def names(directory: SharedDirectory) -> set[str]:
    return {path.name for path in directory.path.iterdir()}


def test_what_is_written_is_what_another_maps_and_never_the_other_way(directory: SharedDirectory) -> None:
    memory = SharedHostMemory(directory, strict=True)
    assert memory.kind is StateStorage.SHARED_MEMORY
    region = memory.allocate(3 * NUM_BYTES)
    assert not region.tensor.any()
    storage = region.locate(NUM_BYTES)
    assert isinstance(storage, SharedMemory)
    assert (storage.offset, storage.boot_id) == (NUM_BYTES, boot_id())
    mapped = MappedFile(directory, storage.path)
    tensor = mapped.tensor(REF, storage.offset)
    region.tensor[NUM_BYTES : 2 * NUM_BYTES].view(torch.float32)[:] = torch.arange(32.0)
    assert torch.equal(tensor, torch.arange(32.0).view(4, 8))
    maps = Path("/proc/self/maps").read_text().splitlines()
    protection = [line.split()[1] for line in maps if storage.path in line]
    assert sorted(protection) == ["r--s", "rw-s"]
    mapped.close()
    memory.close()
    # What is mapped outlives the file; nobody new can map it.
    assert torch.equal(tensor, torch.arange(32.0).view(4, 8))
    assert names(directory) == set()


def test_files_are_private_nameless_until_locked_and_full_size(directory: SharedDirectory) -> None:
    made = [directory.create(10_000) for _ in range(3)]
    assert len(names(directory)) == 3
    for descriptor, path in made:
        status = path.lstat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == 10_000
        assert status.st_blocks * 512 >= 10_000  # reserved, not sparse
        with path.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert directory.sweep() == 3
    assert names(directory) == set()


def test_a_sweep_takes_what_nobody_holds_and_nothing_else(directory: SharedDirectory, tmp_path: Path) -> None:
    memory = SharedHostMemory(directory, strict=True)
    memory.allocate(NUM_BYTES)
    held = names(directory)
    (directory.path / "abandoned.state").touch()
    (directory.path / "notes.txt").touch()
    (tmp_path / "outside").touch()
    (directory.path / "link.state").symlink_to(tmp_path / "outside")
    assert directory.sweep() == 1
    assert names(directory) == held | {"notes.txt", "link.state"}
    assert (tmp_path / "outside").exists()
    memory.close()


OWNER = """
import sys, time
from pathlib import Path
from specdec.runtime.memory import SharedDirectory, SharedHostMemory
memory = SharedHostMemory(SharedDirectory(Path(sys.argv[1])), strict=True)
print(memory.allocate(128).storage.path, flush=True)
sys.stdin.read()
"""


def test_a_killed_owners_file_is_known_to_be_abandoned(directory: SharedDirectory) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory.path.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENV},
        text=True,
    ) as owner:
        assert owner.stdout
        path = owner.stdout.readline().strip()
        mapped = MappedFile(directory, path)
        assert not mapped.is_abandoned
        assert directory.sweep() == 0
        owner.kill()
        owner.wait()
        assert mapped.is_abandoned
        with pytest.raises(FailedPreconditionError, match="verifier is gone") as raised:
            MappedFile(directory, path)
        assert raised.value.reason == "STALE_STATE"
        mapped.close()
        assert directory.sweep() == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_another_users_file_is_not_mapped(directory: SharedDirectory) -> None:
    descriptor, path = directory.create(NUM_BYTES)
    os.chown(path, 12345, 12345)
    with pytest.raises(FailedPreconditionError, match="not this user's"):
        MappedFile(directory, str(path))
    os.close(descriptor)


def test_nothing_is_left_of_a_file_that_is_refused(directory: SharedDirectory) -> None:
    (directory.path / "abandoned.state").write_bytes(b"\0" * NUM_BYTES)
    (directory.path / "empty.state").touch()
    for name in ("abandoned.state", "empty.state", "missing.state"):
        with nothing_left(), pytest.raises(FailedPreconditionError):
            MappedFile(directory, str(directory.path / name))


def test_what_is_released_takes_no_memory_any_more(directory: SharedDirectory) -> None:
    with nothing_left(directory.path):
        memory = SharedHostMemory(directory, strict=True)
        with nothing_left(directory.path):
            for _ in range(3):
                memory.release(memory.allocate(NUM_BYTES))
        kept, released = memory.allocate(NUM_BYTES), memory.allocate(NUM_BYTES)
        memory.release(released)
        memory.release(released)
        assert names(directory) == {Path(kept.storage.path).name}  # type: ignore[union-attr]
        memory.close()
        memory.close()
        del kept, released


def test_memory_that_cannot_be_mapped_leaves_no_file(
    directory: SharedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_address_space(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 128 bytes: Cannot allocate memory (12)")

    memory = SharedHostMemory(directory, strict=True)
    monkeypatch.setattr(torch, "from_file", no_address_space)
    with nothing_left(directory.path), pytest.raises(ResourceExhaustedError, match="Cannot allocate memory"):
        memory.allocate(NUM_BYTES)


def test_nothing_is_left_of_a_mapping_that_was_closed(directory: SharedDirectory) -> None:
    memory = SharedHostMemory(directory, strict=True)
    storage = memory.allocate(NUM_BYTES).storage
    assert isinstance(storage, SharedMemory)
    with nothing_left():
        mapped = MappedFile(directory, storage.path)
        tensor = mapped.tensor(REF, 0)
        mapped.close()
        assert not tensor.any()
        del tensor
    memory.close()


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        ({}, 1),
        ({}, 4),
        ({}, 2**63),
        ({"shape": (5, 8)}, 0),
        ({"shape": (2**40, 2**40)}, 0),
        ({"shape": ()}, 0),
        ({"shape": (0, 2**63)}, 0),
        ({"dtype": "float64"}, 0),
        ({"dtype": "nothing"}, 0),
        ({"dtype": "Tensor"}, 0),
    ],
    ids=str,
)
def test_nothing_is_carved_out_of_what_is_not_there(change: dict[str, object], offset: int) -> None:
    memory = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    assert carve(memory, REF, 0).shape == (4, 8)
    with pytest.raises(FailedPreconditionError) as raised:
        carve(memory, replace(REF, **change), offset)  # type: ignore[arg-type]
    assert raised.value.reason == "STATE_NOT_MAPPED"


def test_a_directory_without_room(directory: SharedDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """The size is larger than any file system."""
    with pytest.raises(ResourceExhaustedError, match="--target-state stream") as raised:
        SharedHostMemory(directory, strict=True).allocate(2**60)
    assert raised.value.reason == "SHARED_MEMORY_FULL"
    assert names(directory) == set()
    directory.path.rmdir()
    region = SharedHostMemory(directory, strict=False).allocate(NUM_BYTES)
    assert region.storage is None
    assert region.locate(4) is None
    assert region.tensor.shape == (NUM_BYTES,)
    assert "has no room" in caplog.text


def test_a_folder_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"specdec-{os.getuid()}").mkdir(mode=0o700)
    SharedDirectory(tmp_path)
    (tmp_path / f"specdec-{os.getuid()}").chmod(0o710)
    with pytest.raises(InvalidArgumentError, match="mode 0700"):
        SharedDirectory(tmp_path)
    with pytest.raises(InvalidArgumentError, match="cannot be made"):
        SharedDirectory(tmp_path / "not-there")


def test_private_memory_is_nowhere_to_be_found() -> None:
    memory = PrivateMemory(torch.device("cpu"))
    for region in (memory.allocate(8), memory.allocate_host(8)):
        assert region.storage is None
        assert not region.tensor.any()
    assert memory.kind is StateStorage.STREAM
