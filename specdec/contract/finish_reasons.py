"""Why a generation ended: the names that users see, by their numbers on the wire."""

from __future__ import annotations

from specdec.v1 import verifier_pb2

FINISH_REASONS = {
    verifier_pb2.FINISH_REASON_UNSPECIFIED: "",
    verifier_pb2.FINISH_REASON_STOP_TOKEN: "stop_token",
    verifier_pb2.FINISH_REASON_LENGTH: "length",
    verifier_pb2.FINISH_REASON_STOP_STRING: "stop_string",
}
