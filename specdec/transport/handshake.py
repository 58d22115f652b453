"""The first exchange of every session, which refuses a peer that cannot work with us and says why."""

from __future__ import annotations

from specdec.contract.errors import FailedPreconditionError
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.v1 import common_pb2


def make_handshake(model_id: str = "", vocabulary_fingerprint: str = "") -> common_pb2.Handshake:
    """Build our side of the exchange."""
    return common_pb2.Handshake(
        protocol_version=PROTOCOL_VERSION,
        min_protocol_version=MIN_PROTOCOL_VERSION,
        model_id=model_id,
        vocabulary_fingerprint=vocabulary_fingerprint,
    )


def check_protocol_version(newest: int, oldest: int = 0) -> None:
    """Refuse a peer that does not speak any version of the protocol that we speak.

    Args:
        newest: the newest version that the peer speaks.
        oldest: the oldest version that the peer speaks; 0: the peer speaks the newest version only.

    Raises:
        FailedPreconditionError: the two ranges of versions do not overlap.
    """
    if newest < MIN_PROTOCOL_VERSION or (oldest or newest) > PROTOCOL_VERSION:
        raise FailedPreconditionError(
            f"The peer speaks protocol {_range(oldest or newest, newest)}, but this service speaks "
            f"{_range(MIN_PROTOCOL_VERSION, PROTOCOL_VERSION)}; upgrade the older side to a release that "
            "shares a version with the newer one.",
            reason="PROTOCOL_VERSION_MISMATCH",
        )


def _range(oldest: int, newest: int) -> str:
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"


def check_handshake(peer: common_pb2.Handshake, *, model_id: str, vocabulary_fingerprint: str) -> None:
    """Refuse a peer with another protocol, model or vocabulary. Values that are empty are not compared.

    Raises:
        FailedPreconditionError: the sides differ; the error names the values of both.
    """
    check_protocol_version(peer.protocol_version, peer.min_protocol_version)
    if peer.model_id and model_id and peer.model_id != model_id:
        raise FailedPreconditionError(
            f"The peer wants model {peer.model_id!r}, but this service runs {model_id!r}; "
            "give both the same model.",
            reason="MODEL_MISMATCH",
        )
    check_vocabulary(peer.vocabulary_fingerprint, vocabulary_fingerprint)


def check_vocabulary(theirs: str, ours: str) -> None:
    """Refuse a peer whose token ids belong to another vocabulary.

    Raises:
        FailedPreconditionError: both fingerprints are known and differ.
    """
    if theirs and ours and theirs != ours:
        raise FailedPreconditionError(
            f"The vocabularies differ (fingerprints {theirs[:12]} and {ours[:12]}): the same token id means "
            "different words. Use a tokenizer, verifier and drafter of one vocabulary.",
            reason="VOCABULARY_MISMATCH",
        )
