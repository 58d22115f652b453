"""Attention of a pass by the kernel (see `attention.c`): which keys each row attends to, in arrays.

A row's bits depend on its own keys, in the order of their positions, and on nothing else: not on the rows
beside it, on whether it is in a chain or in a tree, or on which blocks of the pool the keys are in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_int64, c_void_p

import numpy
import torch
from torch import Tensor

from specdec.runtime.attention import Segment, with_rows
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels.library import LIBRARY, are_for
from specdec.runtime.kernels.products import has_matrices
from specdec.runtime.kv_pool import BLOCK_TOKENS

_BLOCK = 32
"""Positions whose keys are computed with at once, and what dimensions are filled up to a multiple of."""
_MOST_TILE_ROWS = 16
"""Rows of a session that share the work of laying out keys."""
_MOST_TILE_SCORES = 1 << 20
_LEAST_TORCH_HEAD_DIM = 64
"""Where heads are smaller, the library that torch multiplies with chooses its kernel by the number of rows:
with one KV head of 16, 28 and 32 query rows were seen to round otherwise than 4."""


_RowKeys = tuple[int, int, int, int, int]
"""The `Row` of `attention.h`."""


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


def attends(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the kernel is to attend from heads of this size, type and device.

    Its vectors are of 512 bits. Where a CPU has shorter ones, torch is faster, and rounds the same by itself
    where heads are not small.
    """
    return are_for(dtype, device) and (has_long_vectors() or head_dim < _LEAST_TORCH_HEAD_DIM)


def has_long_vectors() -> bool:
    """Whether this CPU has vectors of 512 bits."""
    return torch.cpu._is_avx512_supported()


class RowPlan:
    """How the layers of one geometry attend: see `AttentionPlan`, whose place it takes.

    Args:
        num_rows: rows of the pass; those behind the segments' tokens only fill up, and get zeros.
    """

    def __init__(self, segments: Sequence[Segment], geometry: Geometry, num_rows: int) -> None:
        self._num_rows, self._geometry = num_rows, geometry
        # A tail is no longer than its segment, from the block on in which that begins.
        most_keys = _up_to(_BLOCK, max(segment.stop for segment in segments))
        tile_rows = max(1, min(_MOST_TILE_ROWS, _MOST_TILE_SCORES // (geometry.fold * most_keys)))
        tables, places = _Tables(), list[int]()
        tiles, rows = list[tuple[int, int, int, int]](), list[_RowKeys]()
        for row, segment in with_rows(segments):
            table = tables.add(segment.allocation.blocks)
            if segment.parents:
                shared, of_rows = _tree_rows(segment, row, geometry.window, places)
            else:
                shared, of_rows = 0, _chain_rows(segment, row, geometry.window)
            for first in range(0, len(of_rows), tile_rows):
                part = of_rows[first : first + tile_rows]
                tiles.append((len(part), len(rows) + first, table, shared or int(part[-1][2])))
            rows.extend(of_rows)
        self._arrays = [
            numpy.array(values, dtype=numpy.int64) for values in (tiles, rows, tables.blocks, places)
        ]
        heads = _up_to(16, tile_rows * geometry.fold)
        width = _up_to(_BLOCK, geometry.head_dim)
        scratch_bytes = 4 * ((_BLOCK + 2 * heads) * width + heads * (1 + most_keys))
        num_threads = torch.get_num_threads()
        self._scratch = numpy.empty(num_threads * scratch_bytes, dtype=numpy.uint8)
        self._layer = _Layer(
            0,
            0,
            0,
            0,
            *(array.ctypes.data for array in self._arrays),
            self._scratch.ctypes.data,
            scratch_bytes,
            len(rows),
            num_rows - len(rows),
            len(tiles),
            most_keys,
            BLOCK_TOKENS,
            geometry.stride or geometry.num_heads,
            geometry.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            num_threads,
            has_matrices(),
            0.0,
            0.0,
        )
        self._address = ctypes.addressof(self._layer)

    def attend(
        self, packed: Tensor, keys: Tensor, values: Tensor, scaling: float | None, softcap: float
    ) -> Tensor:
        """Attention of every token over its own session's KV; see `AttentionPlan.attend`."""
        geometry, layer = self._geometry, self._layer
        out = packed.new_empty((self._num_rows, geometry.num_heads, geometry.head_dim))
        layer.queries, layer.out = packed.data_ptr(), out.data_ptr()
        layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        layer.scaling, layer.softcap = scaling or geometry.head_dim**-0.5, softcap
        LIBRARY.attend(self._address)
        return out

    def buffers(self) -> list[Tensor]:
        """Nothing: passes on a CPU have their own sizes, and are not recorded."""
        return []


def _chain_rows(segment: Segment, row: int, window: int) -> list[_RowKeys]:
    return [
        (row + index, _first_key(position, window), position + 1, 0, 0)
        for index, position in enumerate(range(segment.start, segment.stop))
    ]


def _tree_rows(segment: Segment, row: int, window: int, places: list[int]) -> tuple[int, list[_RowKeys]]:
    """How many keys all tokens of a tree share, and the rows, whose other keys are appended to `places`."""
    start = segment.start
    shared = start // _BLOCK * _BLOCK
    begun = list(range(shared, start))
    rows, paths = list[_RowKeys](), list[list[int]]()
    for index, (parent, position) in enumerate(zip(segment.parents, segment.positions, strict=True)):
        paths.append([*(begun if parent < 0 else paths[parent]), start + index])
        rows.append((row + index, _first_key(position, window), shared, len(places), len(paths[-1])))
        places.extend(paths[-1])
    return shared, rows


def _up_to(multiple: int, number: int) -> int:
    return -(-number // multiple) * multiple


def _first_key(position: int, window: int) -> int:
    return max(0, position - window + 1) if window else 0


class _Tables:
    """The block tables of a pass, one after the other."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def add(self, blocks: Iterable[int]) -> int:
        """Add a table and return where it begins."""
        begin = len(self.blocks)
        self.blocks.extend(blocks)
        return begin
