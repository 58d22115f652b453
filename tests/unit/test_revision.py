"""Which weights a folder holds."""

from __future__ import annotations

from pathlib import Path

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
    ]
    assert len({first, *map(revision, others)}) == 5


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    assert revision(folder_with(tmp_path / "snapshots" / "abc123", b"weights")) == "abc123"
