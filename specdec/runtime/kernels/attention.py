"""Attention of a pass by the kernel (see `attention.c`): which keys each row attends to, in arrays.

A row's bits depend on its own keys, in the order of their positions, and on nothing else: not on the rows
beside it, on whether it is in a chain or in a tree, or on which blocks of the pool the keys are in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from specdec.runtime.attention import Segment, first_key
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels.library import LIBRARY, are_for
from specdec.runtime.kernels.products import has_matrices
from specdec.runtime.kv_slots import BLOCK_TOKENS

BLOCK = 32
"""Positions whose keys are computed with at once, and what dimensions are filled up to a multiple of."""
_MOST_TILE_ROWS = 16
"""Rows of a session that share the work of laying out keys."""
_MOST_TILE_SCORES = 1 << 20
_LEAST_TORCH_HEAD_DIM = 64
"""Where heads are smaller, the library that torch multiplies with chooses its kernel by the number of rows:
with one KV head of 16, 28 and 32 query rows were seen to round otherwise than 4."""


class RowKeys(NamedTuple):
    """Which keys a row attends to: the `Row` of `attention.h`."""

    token: int
    """Row of the pass."""
    first: int
    """Position of its first key."""
    stop: int
    """Position after its last key that is not in its tail."""
    tail: int = 0
    """Where its tail begins among the session's places."""
    num_tail: int = 0


class _Layer(ctypes.Structure):
    """The `Layer` of `attention.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("queries", "keys", "values", "out")),
        *((name, c_void_p) for name in ("tiles", "rows", "tables", "places", "scratch")),
        *(
            (name, c_int64)
            for name in (
                "scratch_bytes",
                "num_tokens",
                "num_fill",
                "num_tiles",
                "most_keys",
                "block_tokens",
                "stride",
            )
        ),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "dim", "num_threads", "has_matrices")),
        *((name, c_double) for name in ("scaling", "softcap")),
    )


def attends(dtype: torch.dtype, device: torch.device, head_dim: int, value_dim: int = 0) -> bool:
    """Whether the kernel is to attend from heads of this size, type and device.

    Its vectors are of 512 bits. Where a CPU has shorter ones, torch is faster, and rounds the same by itself
    where heads are not small. Values must have the size of keys (0: they have).
    """
    is_faster = has_long_vectors() or head_dim < _LEAST_TORCH_HEAD_DIM
    return are_for(dtype, device) and value_dim in (0, head_dim) and is_faster


def has_long_vectors() -> bool:
    """Whether this CPU has vectors of 512 bits."""
    return torch.cpu._is_avx512_supported()


@dataclass(frozen=True, slots=True)
class SessionRows:
    """Rows of one session, and the keys that each attends to."""

    blocks: Sequence[int]
    """The session's block table."""
    rows: Sequence[RowKeys]
    num_shared: int
    """Keys before this position are where their positions say. Those from it on are in tails, and it is a
    multiple of 32; without tails it is the position after the last key of all rows."""
    places: Sequence[int] = ()
    """Positions that say where keys of tails are."""

    @classmethod
    def of(cls, segment: Segment, row: int, window: int) -> SessionRows:
        """Return those of a segment, the first of which is `row` of the pass, in layers with that window."""
        if segment.parents:
            return cls._of_tree(segment, row, window)
        positions = range(segment.start, segment.stop)
        rows = [
            RowKeys(row + index, first_key(position, window), position + 1)
            for index, position in enumerate(positions)
        ]
        return cls(_blocks_for(segment, window), rows, segment.stop)

    @classmethod
    def _of_tree(cls, segment: Segment, row: int, window: int) -> SessionRows:
        start, shared = segment.start, segment.start // BLOCK * BLOCK
        rows, places = list[RowKeys](), list[int]()
        for index, (path, position) in enumerate(zip(segment.paths, segment.positions, strict=True)):
            tail = [*range(shared, start), *(start + token for token in path)]
            rows.append(RowKeys(row + index, first_key(position, window), shared, len(places), len(tail)))
            places.extend(tail)
        return cls(_blocks_for(segment, window), rows, shared, places)


def _blocks_for(segment: Segment, window: int) -> Sequence[int]:
    """Return the block table of layers with that window. The kernel reads no block that is gone."""
    table = segment.allocation.table(window > 0)
    assert first_key(segment.start, window) >= table.first, "a key's block was given back"
    return table.blocks


class RowPlan:
    """How the layers of one geometry attend: see `AttentionPlan`, whose place it takes.

    Args:
        num_rows: rows of the pass; those behind the sessions' only fill up, and get zeros.
    """

    def __init__(self, sessions: Sequence[SessionRows], geometry: Geometry, num_rows: int) -> None:
        self._num_rows, self._geometry = num_rows, geometry
        longest = max(
            session.num_shared + max((row.num_tail for row in session.rows), default=0)
            for session in sessions
        )
        most_keys = _up_to(BLOCK, longest)
        tile_rows = max(1, min(_MOST_TILE_ROWS, _MOST_TILE_SCORES // (geometry.fold * most_keys)))
        tables, places = list[int](), list[int]()
        tiles, rows = list[tuple[int, int, int, int]](), list[RowKeys]()
        for session in sessions:
            for part in _parts(session.rows, tile_rows):
                shared = min(session.num_shared, max(row.stop for row in part))
                tiles.append((len(part), len(rows), len(tables), shared))
                rows.extend(row._replace(tail=row.tail + len(places)) for row in part)
            tables.extend(session.blocks)
            places.extend(session.places)
        lists = {"tiles": tiles, "rows": rows, "tables": tables, "places": places}
        self._arrays = {name: numpy.array(values, dtype=numpy.int64) for name, values in lists.items()}
        heads = _up_to(16, tile_rows * geometry.fold)
        width = _up_to(BLOCK, geometry.head_dim)
        scratch_bytes = 4 * ((BLOCK + 2 * heads) * width + heads * (1 + most_keys))
        num_threads = torch.get_num_threads()
        self._scratch = numpy.empty(num_threads * scratch_bytes, dtype=numpy.uint8)
        self._layer = _Layer(
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            scratch=self._scratch.ctypes.data,
            scratch_bytes=scratch_bytes,
            num_tokens=len(rows),
            num_fill=num_rows - len(rows),
            num_tiles=len(tiles),
            most_keys=most_keys,
            block_tokens=BLOCK_TOKENS,
            stride=geometry.stride or geometry.num_heads,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            dim=geometry.head_dim,
            num_threads=num_threads,
            has_matrices=has_matrices(),
        )
        self._address = ctypes.addressof(self._layer)

    def attend(
        self, packed: Tensor, keys: Tensor, values: Tensor, scaling: float | None, softcap: float
    ) -> Tensor:
        """Attention of every token over its own session's KV; see `AttentionPlan.attend`."""
        geometry, layer = self._geometry, self._layer
        if not packed.shape[-1] == keys.shape[-1] == values.shape[-1] == geometry.head_dim:
            raise ValueError(f"heads of another size: {packed.shape}, {keys.shape}, {values.shape}")
        out = packed.new_empty((self._num_rows, geometry.num_heads, geometry.head_dim))
        layer.queries, layer.out = packed.data_ptr(), out.data_ptr()
        layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        layer.scaling, layer.softcap = scaling or geometry.head_dim**-0.5, softcap
        LIBRARY.attend(self._address)
        return out

    def buffers(self) -> list[Tensor]:
        """Nothing: passes on a CPU have their own sizes, and are not recorded."""
        return []


def _parts(rows: Sequence[RowKeys], size: int) -> Iterator[Sequence[RowKeys]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _up_to(multiple: int, number: int) -> int:
    return -(-number // multiple) * multiple
