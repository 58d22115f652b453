"""Sizes of an answer's messages that do not tell what is in them."""

from __future__ import annotations

from specdec.v1 import gateway_pb2

_LEAST_BYTES = 2
"""Bytes that padding of no bytes takes: its tag and its length."""


def pad(response: gateway_pb2.GenerateResponse, multiple: int) -> None:
    """Make the size of a message a multiple of so many bytes; 0: leave it as it is."""
    if not multiple:
        return
    size = response.ByteSize()
    wanted = -(-(size + _LEAST_BYTES) // multiple) * multiple
    while response.ByteSize() != wanted:
        response.padding = bytes(wanted - size - _LEAST_BYTES)
        if (excess := response.ByteSize() - wanted) > 0:
            # The length of long padding takes more than a byte itself.
            response.padding = response.padding[excess:]
        if response.ByteSize() < wanted:
            wanted += multiple  # the shorter padding has a shorter length: there is none of exactly that size
