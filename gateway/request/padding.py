"""Sizes of an answer's messages that do not tell what is in them."""

from __future__ import annotations

from itertools import product

from specdec.v1 import gateway_pb2

_EMPTY_BYTES = 2
"""Bytes that padding of no bytes takes: its tag and its length."""


def pad(response: gateway_pb2.GenerateResponse, multiple: int) -> None:
    """Make the size of a message the next multiple of so many bytes; 0: leave it as it is."""
    if not multiple:
        return
    missing = -response.ByteSize() % multiple
    response.padding.extend(_fields(missing if missing != 1 else multiple + 1))


def _fields(num_bytes: int) -> list[bytes]:
    """Return zeros that take so many bytes, not 1, as one field or, beside an empty one, as another."""
    if not num_bytes:
        return []
    lengths = range(1, 6)
    for others, length in product(([], [b""]), lengths):
        num_zeros = num_bytes - 1 - length - _EMPTY_BYTES * len(others)
        if num_zeros >= 0 and length == max(1, -(-num_zeros.bit_length() // 7)):
            return [bytes(num_zeros), *others]
    raise AssertionError(f"{num_bytes} bytes of padding cannot be made")
