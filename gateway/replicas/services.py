"""The services behind the gateway, verifiers and drafters, as sets of replicas."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from gateway.replicas.names import Resolve, resolve_name
from gateway.replicas.replica_set import RESOLVE_INTERVAL_S, ReplicaSet
from gateway.replicas.sessions import DRAFTING, VERIFYING
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import is_drafter_name
from specdec.transport.handshake import check_protocol_version, check_vocabulary
from specdec.transport.tls import OutgoingTls
from specdec.v1 import drafter_pb2, drafter_pb2_grpc, verifier_pb2, verifier_pb2_grpc

VerifierSet = ReplicaSet[verifier_pb2.VerifierServiceGetInfoResponse]
DrafterSet = ReplicaSet[drafter_pb2.DrafterServiceGetInfoResponse]

VERIFIER_SERVICE = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name
DRAFTER_SERVICE = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

_INFO_TIMEOUT_S = 5.0
_MAX_INFO_BYTES = 64 * 1024
"""Most a drafter service may say of itself: clients are told all of it."""


def make_verifier_set(
    uris: Sequence[str],
    vocabulary_fingerprint: str,
    *,
    resolve: Resolve = resolve_name,
    resolve_interval_s: float = RESOLVE_INTERVAL_S,
    tls: OutgoingTls | None = None,
) -> VerifierSet:
    """Make the set of verifiers, of which those with the gateway's vocabulary are used."""

    def check(info: verifier_pb2.VerifierServiceGetInfoResponse) -> None:
        check_protocol_version(info.protocol_version, info.min_protocol_version)
        check_vocabulary(info.model.vocabulary_fingerprint, vocabulary_fingerprint)

    async def get_info(channel: grpc.aio.Channel) -> verifier_pb2.VerifierServiceGetInfoResponse:
        request = verifier_pb2.VerifierServiceGetInfoRequest()
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        info: verifier_pb2.VerifierServiceGetInfoResponse
        info = await stub.GetInfo(request, timeout=_INFO_TIMEOUT_S)
        return info

    return ReplicaSet(
        VERIFIER_SERVICE,
        uris,
        get_info=get_info,
        check=check,
        resolve=resolve,
        resolve_interval_s=resolve_interval_s,
        tls=tls,
        kind=VERIFYING,
    )


def make_drafter_set(uris: Sequence[str], *, tls: OutgoingTls | None = None) -> DrafterSet:
    """Make the set of drafter services. Each session asks whether a drafter fits the vocabulary."""

    def check(info: drafter_pb2.DrafterServiceGetInfoResponse) -> None:
        check_protocol_version(info.protocol_version, info.min_protocol_version)
        if info.ByteSize() > _MAX_INFO_BYTES:
            raise InvalidArgumentError(
                f"It describes itself in {info.ByteSize()} bytes; at most {_MAX_INFO_BYTES} are taken."
            )
        for drafter in info.drafters:
            if not is_drafter_name(drafter.name):
                raise InvalidArgumentError(f"{drafter.name[:80]!r} is not a name of a drafter.")

    async def get_info(channel: grpc.aio.Channel) -> drafter_pb2.DrafterServiceGetInfoResponse:
        request = drafter_pb2.DrafterServiceGetInfoRequest()
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        info: drafter_pb2.DrafterServiceGetInfoResponse
        info = await stub.GetInfo(request, timeout=_INFO_TIMEOUT_S)
        return info

    return ReplicaSet(DRAFTER_SERVICE, uris, get_info=get_info, check=check, tls=tls, kind=DRAFTING)


def find_drafter(
    info: drafter_pb2.DrafterServiceGetInfoResponse, name: str
) -> drafter_pb2.DrafterInfo | None:
    """Return the drafter of that name in a service."""
    return next((drafter for drafter in info.drafters if drafter.name == name), None)
