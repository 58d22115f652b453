"""Which peers can work with each other: protocol versions are ranges, and they must overlap."""

from __future__ import annotations

import pytest

from specdec.contract.errors import FailedPreconditionError
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.transport import handshake
from specdec.transport.handshake import check_handshake, check_protocol_version, make_handshake
from specdec.v1 import common_pb2


def test_a_release_works_with_itself() -> None:
    ours = make_handshake("a/model", "ab" * 32)
    assert (ours.protocol_version, ours.min_protocol_version) == (PROTOCOL_VERSION, MIN_PROTOCOL_VERSION)
    check_handshake(ours, model_id="a/model", vocabulary_fingerprint="ab" * 32)


@pytest.mark.parametrize(
    ("newest", "oldest", "fits"),
    [
        *((3, 3, True), (5, 5, True), (9, 5, True), (3, 1, True), (4, 0, True), (9, 1, True)),
        *((2, 1, False), (2, 0, False), (0, 0, False), (6, 6, False), (9, 6, False), (6, 0, False)),
    ],
)
def test_ranges_must_overlap(newest: int, oldest: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MIN_PROTOCOL_VERSION", 3)
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", 5)
    if fits:
        check_protocol_version(newest, oldest)
        return
    with pytest.raises(FailedPreconditionError, match="versions 3 to 5") as raised:
        check_protocol_version(newest, oldest)
    assert raised.value.reason == "PROTOCOL_VERSION_MISMATCH"


def test_the_two_ends_of_an_upgrade_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    old = common_pb2.Handshake(protocol_version=PROTOCOL_VERSION, min_protocol_version=PROTOCOL_VERSION)
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    check_handshake(old, model_id="", vocabulary_fingerprint="")
