"""Rows in the host's memory: which number is the largest, and moving them (see `rows.c`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from specdec.runtime.kernels.library import LIBRARY


def arg_max(rows: Tensor) -> Tensor:
    """Return the index of the first of each row's largest numbers, or of its NaNs [rows].

    Args:
        rows: [rows, size] in bf16, in the host's memory.
    """
    rows = rows.contiguous()
    num_rows, size = rows.shape
    index = torch.empty(num_rows, dtype=torch.int64)
    LIBRARY.arg_max(rows.data_ptr(), index.data_ptr(), num_rows, size)
    return index


def can_move(device: torch.device) -> bool:
    """Whether the kernel moves rows of a device's memory."""
    return LIBRARY is not None and device.type == "cpu"


def move(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy rows of several tensors [slots, ...] to others; all of a tensor are read before one is written.

    Args:
        tensors: contiguous.
        sources, targets: slots [num_rows].
    """
    sources, targets = sources.contiguous(), targets.contiguous()
    addresses = numpy.array([tensor.data_ptr() for tensor in tensors], dtype=numpy.uintp)
    sizes = numpy.array([tensor.stride(0) * tensor.itemsize for tensor in tensors], dtype=numpy.int64)
    room = numpy.empty(len(sources) * int(sizes.max()), dtype=numpy.uint8)
    LIBRARY.move(
        addresses.ctypes.data,
        sizes.ctypes.data,
        len(tensors),
        sources.data_ptr(),
        targets.data_ptr(),
        len(sources),
        room.ctypes.data,
    )
