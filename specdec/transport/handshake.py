"""The first exchange of every session: refuse a peer that cannot work with us, and say why."""

from __future__ import annotations

from specdec import PROTOCOL_VERSION
from specdec.contract.errors import FailedPreconditionError
from specdec.v1 import common_pb2


def make_handshake(model_id: str = "", vocabulary_fingerprint: str = "") -> common_pb2.Handshake:
    """Our side of the exchange."""
    return common_pb2.Handshake(
        protocol_version=PROTOCOL_VERSION,
        model_id=model_id,
        vocabulary_fingerprint=vocabulary_fingerprint,
    )


def check_protocol_version(version: int) -> None:
    """Refuse another protocol.

    Raises:
        FailedPreconditionError: the peer speaks another version.
    """
    if version != PROTOCOL_VERSION:
        raise FailedPreconditionError(
            f"The peer speaks protocol version {version}, this service version {PROTOCOL_VERSION}; "
            "run the same release on both sides.",
            reason="PROTOCOL_VERSION_MISMATCH",
        )


def check_handshake(peer: common_pb2.Handshake, *, model_id: str, vocabulary_fingerprint: str) -> None:
    """Refuse a peer with another protocol, model or vocabulary. What either side left empty is not compared.

    Raises:
        FailedPreconditionError: naming both sides' values.
    """
    check_protocol_version(peer.protocol_version)
    if peer.model_id and model_id and peer.model_id != model_id:
        raise FailedPreconditionError(
            f"The peer wants model {peer.model_id!r}, this service runs {model_id!r}.",
            reason="MODEL_MISMATCH",
        )
    check_vocabulary(peer.vocabulary_fingerprint, vocabulary_fingerprint)


def check_vocabulary(theirs: str, ours: str) -> None:
    """Refuse token ids of another vocabulary.

    Raises:
        FailedPreconditionError: both fingerprints are known and differ.
    """
    if theirs and ours and theirs != ours:
        raise FailedPreconditionError(
            f"The vocabularies differ (fingerprints {theirs[:12]} and {ours[:12]}): token ids of one mean "
            "other words in the other. Use a tokenizer, verifier and drafter of one vocabulary.",
            reason="VOCABULARY_MISMATCH",
        )
