"""Errors on the wire: short enough to send, and read whatever a peer put there."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError, from_rpc_error, to_status

DETAILS = "grpc-status-details-bin"


def received(code: grpc.StatusCode, message: str, details: bytes) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((DETAILS, details))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, message)


def test_details_come_back_as_they_were_sent() -> None:
    sent = ResourceExhaustedError("No room.", reason="FULL", field="size", retry_after_s=1.5)
    status = to_status(sent)
    details = dict(status.trailing_metadata or ())[DETAILS]
    assert isinstance(details, bytes)
    error = from_rpc_error(received(status.code, status.details or "", details))
    assert type(error) is ResourceExhaustedError
    assert (error.message, error.reason, error.field, error.retry_after_s) == (
        "No room.",
        "FULL",
        "size",
        1.5,
    )


@pytest.mark.parametrize(
    "details",
    [
        b"\xff" * 40,
        status_pb2.Status(
            code=3,
            details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")],
        ).SerializeToString(),
    ],
    ids=["no status", "no detail"],
)
def test_details_that_cannot_be_read_leave_code_and_message(details: bytes) -> None:
    error = from_rpc_error(received(grpc.StatusCode.INVALID_ARGUMENT, "Wrong.", details))
    assert type(error) is InvalidArgumentError
    assert error.message == "Wrong."


@pytest.mark.parametrize("character", ["x", "\N{JAPANESE OGRE}"])
def test_a_message_of_megabytes_is_shortened_at_once(character: str) -> None:
    error = InvalidArgumentError(f"What is wrong: {character * 8_000_000}. What to do.")
    started = time.process_time()
    message = to_status(error).details or ""
    assert time.process_time() - started < 0.5
    assert message.startswith("What is wrong: ")
    assert message.endswith("What to do.")
    assert len(message) < 1600
