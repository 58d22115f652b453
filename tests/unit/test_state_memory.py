"""Files that hold target state: who may map them, and when they go."""

from __future__ import annotations

import fcntl
import grp
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
from specdec.runtime.memory import PrivateMemory, SharedHostMemory
from specdec.runtime.state_files import SharedDirectory, StateFiles, same_file
from specdec.state.mapped_file import MappedFile, carve
from tests.leftovers import nothing_left
from tests.probe_service import ENV
from verifier_service.config import VerifierConfig

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
from specdec.runtime.memory import SharedHostMemory
from specdec.runtime.state_files import SharedDirectory
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
    with pytest.raises(FailedPreconditionError, match="neither this user's"):
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


class TestGroup:
    """A group that may read; the owner's own stands for one here, in which the tests' user is."""

    group = os.getgid()

    def test_its_members_may_read_and_nobody_else_may_write(self, tmp_path: Path) -> None:
        old_mask = os.umask(0o077)
        try:
            directory = SharedDirectory(tmp_path, self.group)
            descriptor, path = directory.create(NUM_BYTES)
        finally:
            os.umask(old_mask)
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o750
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert {directory.path.stat().st_gid, path.stat().st_gid} == {self.group}
        os.close(descriptor)

    def test_a_directory_that_was_private_is_opened_and_one_others_enter_is_refused(
        self, tmp_path: Path
    ) -> None:
        directory = SharedDirectory(tmp_path).path
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        SharedDirectory(tmp_path, self.group)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750
        with pytest.raises(InvalidArgumentError, match="mode 0700"):
            SharedDirectory(tmp_path)
        directory.rmdir()
        directory.symlink_to(tmp_path)
        with pytest.raises(InvalidArgumentError, match="mode 0750"):
            SharedDirectory(tmp_path, self.group)

    def test_a_reader_needs_no_directory_of_its_own(self, tmp_path: Path) -> None:
        files = StateFiles(tmp_path, self.group)
        assert files.sweep() == 0
        assert list(tmp_path.iterdir()) == []
        memory = SharedHostMemory(SharedDirectory(tmp_path, self.group), strict=True)
        storage = memory.allocate(NUM_BYTES).storage
        assert isinstance(storage, SharedMemory)
        mapped = MappedFile(files, storage.path)
        assert mapped.tensor(REF, 0).shape == (4, 8)
        mapped.close()
        memory.close()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
    @pytest.mark.parametrize(
        ("folder_mode", "file_mode", "group", "owner"),
        [
            (0o750, 0o660, 12345, 12345),
            (0o770, 0o640, 12345, 12345),
            (0o757, 0o640, 12345, 12345),
            (0o750, 0o640, 12346, 12345),
            (0o750, 0o640, 12345, 12346),
        ],
    )
    def test_files_that_others_could_write_or_that_are_of_another_group_are_not_mapped(
        self, folder_mode: int, file_mode: int, group: int, owner: int, tmp_path: Path
    ) -> None:
        folder = tmp_path / "specdec-12345"
        folder.mkdir()
        path = folder / f"{'0' * 32}.state"
        path.write_bytes(bytes(NUM_BYTES))
        files = StateFiles(tmp_path, 12345)
        for part, uid, mode in ((path, owner, file_mode), (folder, 12345, folder_mode)):
            os.chown(part, uid, group)
            part.chmod(mode)
        with nothing_left(), pytest.raises(FailedPreconditionError, match="neither this user's"):
            MappedFile(files, str(path))
        for part, mode in ((path, 0o640), (folder, 0o750)):
            os.chown(part, 12345, 12345)
            part.chmod(mode)
        with pytest.raises(FailedPreconditionError, match="verifier is gone"):
            MappedFile(files, str(path))
        with pytest.raises(FailedPreconditionError, match="--shared-group"):
            MappedFile(StateFiles(tmp_path), str(path))

    def test_a_directory_that_was_replaced_gets_no_state(self, tmp_path: Path) -> None:
        directory = SharedDirectory(tmp_path, self.group)
        directory.path.rename(tmp_path / "away")
        (tmp_path / "trap").mkdir(mode=0o777)
        directory.path.symlink_to(tmp_path / "trap")
        with nothing_left(), pytest.raises(OSError, match=r"(?i)not a directory|symbolic"):
            directory.create(NUM_BYTES)
        assert list((tmp_path / "trap").iterdir()) == []

    def test_a_file_that_was_replaced_is_not_mapped(self, tmp_path: Path) -> None:
        descriptor, path = SharedDirectory(tmp_path, self.group).create(NUM_BYTES)
        with same_file(str(path), descriptor) as again:
            assert Path(again).samefile(path)
        path.unlink()
        path.write_bytes(bytes(NUM_BYTES))
        with pytest.raises(PermissionError), same_file(str(path), descriptor):
            pass
        os.close(descriptor)

    def test_an_option_names_a_group_of_the_host(self) -> None:
        name = grp.getgrgid(0).gr_name
        assert VerifierConfig().shared_gid is None
        assert VerifierConfig(shared_group=name).shared_gid == 0
        assert VerifierConfig(shared_group="10001").shared_gid == 10001
        for wrong in ("no-such-group", "-1", "2147483648", "1.0"):
            with pytest.raises(InvalidArgumentError, match="--shared-group") as raised:
                VerifierConfig(shared_group=wrong)
            assert raised.value.field == "shared_group"
