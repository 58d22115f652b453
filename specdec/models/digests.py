"""Digests of whole files, fast enough for the weights of a large model at every start.

Every byte counts, so that no change of the weights goes unseen. BLAKE2b needs no special instructions of the
CPU and takes in up to a gigabyte a second on one core; the file is cut into pieces, which threads digest at
the same time, so that the disk or the memory sets the pace. The digest of a file of a gigabyte or more is
also kept in the cache directory, beside what the file system says of the file: path, device, inode, size, and
times of change in nanoseconds. A file of which all of these are the same is not read again. The time of the
inode's change is among them because, unlike the modification time, no program can set it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from specdec.models.embedded import cache_directory

KEPT_FROM_BYTES = 2**30
"""Size from which the digest of a file is kept. A smaller file is read in about a second."""

SETTLED_NS = 2 * 10**9
"""Nanoseconds for which a file must not have changed before its digest is kept. A second change within one
tick of the file system's clock leaves all times as they are."""

_PIECE_BYTES = 2**26
_READ_BYTES = 2**20


def file_digest(path: Path) -> str:
    """Return the hexadecimal digest of a file's content."""
    before = _identity(path)
    kept = _read_kept(path, before) if before["size"] >= KEPT_FROM_BYTES else None
    if kept is not None:
        return kept
    digest = _digest_pieces(path, before["size"])
    settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED_NS
    if before["size"] >= KEPT_FROM_BYTES and settled and _identity(path) == before:
        _keep(path, before, digest)
    return digest


def _digest_pieces(path: Path, size: int) -> str:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        pieces = threads.map(partial(_digest_piece, path), range(0, max(1, size), _PIECE_BYTES))
        return hashlib.blake2b(b"".join(pieces), digest_size=32).hexdigest()


def _digest_piece(path: Path, start: int) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(_PIECE_BYTES // _READ_BYTES):
            digest.update(file.read(_READ_BYTES))  # hashlib frees the GIL meanwhile
    return digest.digest()


def _identity(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _kept_path(path: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=20).hexdigest()
    return cache_directory() / "digests" / f"{name}.json"


def _read_kept(path: Path, identity: dict[str, int]) -> str | None:
    try:
        kept = json.loads(_kept_path(path).read_text())
        return str(kept["digest"]) if kept["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, identity: dict[str, int], digest: str) -> None:
    target = _kept_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"identity": identity, "digest": digest}, file)
        Path(temporary).replace(target)
    except OSError:
        pass  # a cache that cannot be written only costs the next start its time
