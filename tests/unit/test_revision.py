"""Which weights a folder holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specdec.models import digests
from specdec.models.files import revision


def folder_with(path: Path, weights: bytes, config: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_equal_folders_have_equal_revisions_and_others_another(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 1024
    first = revision(folder_with(tmp_path / "a", weights))
    assert first == revision(folder_with(tmp_path / "b", weights))
    others = [
        folder_with(tmp_path / "c", weights[:-1] + b"x"),
        folder_with(tmp_path / "d", b"x" + weights[1:]),
        folder_with(tmp_path / "e", weights + b"x"),
        folder_with(tmp_path / "f", weights, '{"a": 1}'),
        folder_with(tmp_path / "g", weights[:131_072] + b"x" + weights[131_073:]),
    ]
    assert len({first, *map(revision, others)}) == 6


def test_every_piece_of_a_large_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE_BYTES", 2**21)
    weights = bytes(5 * 2**20 + 17)
    revisions = {revision(folder_with(tmp_path / "same", weights))}
    for position in range(0, len(weights), 2**20):
        changed = bytearray(weights)
        changed[position] = 1
        revisions.add(revision(folder_with(tmp_path / str(position), bytes(changed))))
    assert len(revisions) == 7


@pytest.fixture
def kept_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the digests of all files, however small or new, in a directory of the test's own."""
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    return tmp_path / "cache" / "digests"


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path, kept_digests: Path) -> None:
    folder = folder_with(tmp_path / "model", b"weights")
    first = revision(folder)
    for kept in kept_digests.iterdir():
        kept.write_text(kept.read_text().replace('"digest": "', '"digest": "kept '))
    assert revision(folder) not in (first, "")
    assert len(list(kept_digests.iterdir())) == 2


def test_a_file_replaced_with_its_old_times_is_read_again(tmp_path: Path, kept_digests: Path) -> None:
    folder = folder_with(tmp_path / "model", b"weights")
    weights = folder / "model.safetensors"
    stat = weights.stat()
    first = revision(folder)
    assert kept_digests.is_dir()
    while weights.stat().st_ctime_ns == stat.st_ctime_ns:  # until the file system's clock ticks
        weights.write_bytes(b"changed")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert revision(folder) != first


def test_a_file_that_just_changed_is_not_kept(
    tmp_path: Path, kept_digests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 3600 * 10**9)
    revision(folder_with(tmp_path / "model", b"weights"))
    assert not kept_digests.exists()


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, kept_digests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = revision(folder_with(tmp_path / "a", b"weights"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path / "file"))
    assert revision(folder_with(tmp_path / "b", b"weights")) == first


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    assert revision(folder_with(tmp_path / "snapshots" / commit, b"weights")) == commit
    first = revision(folder_with(tmp_path / "snapshots" / "latest", b"weights"))
    assert first != revision(folder_with(tmp_path / "other" / "snapshots" / "latest", b"changed"))
