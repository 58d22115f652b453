"""A `dns:` name with several addresses: each is a replica, and they come and go with the name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from gateway.replicas.names import resolve_name
from gateway.replicas.services import VerifierSet, make_verifier_set
from specdec.contract.errors import UnavailableError
from specdec.models.files import vocabulary_fingerprint
from tests.integration.gated_drafter import eventually
from tests.systems import running_verifier

NAME = "dns:///verifiers:50051"


class NameServer:
    """Answers with what a test sets; None: it cannot be reached."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] | None = addresses
        self.num_asked = 0

    async def resolve(self, uri: str) -> Sequence[str]:
        assert uri == NAME
        self.num_asked += 1
        if self.addresses is None:
            raise OSError("no answer")
        return self.addresses

    async def asked_again(self) -> None:
        """Return once the current answer was heard."""
        before = self.num_asked
        await eventually(lambda: self.num_asked >= before + 2)


def ready(verifiers: VerifierSet) -> set[str]:
    return {replica.uri for replica in verifiers.replicas if replica.is_ready}


async def test_replicas_follow_the_addresses_of_a_name(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (first_address, first),
        running_verifier(tiny_llama) as (second_address, second),
    ):
        names = NameServer(first_address)
        verifiers = make_verifier_set(
            [NAME], vocabulary_fingerprint(tiny_llama), resolve=names.resolve, resolve_interval_s=0.02
        )
        try:
            await eventually(lambda: ready(verifiers) == {first_address})
            names.addresses = (first_address, second_address)
            await eventually(lambda: ready(verifiers) == {first_address, second_address})
            # One leaves: only it is lost, at once, and it goes away when the name no longer has it.
            await first.host.stop(0)
            await eventually(lambda: ready(verifiers) == {second_address})
            assert verifiers.pick().uri == second_address
            (left,) = [replica for replica in verifiers.replicas if replica.uri == first_address]
            channel = left.channel
            names.addresses = (second_address,)
            await eventually(lambda: [replica.uri for replica in verifiers.replicas] == [second_address])
            await eventually(lambda: channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
            # A name server that fails takes nothing away.
            names.addresses = None
            await names.asked_again()
            assert verifiers.pick().uri == second_address
            # Not what is down for a moment either: it is still told why it is not used.
            await second.host.stop(0)
            await eventually(lambda: not ready(verifiers))
            await names.asked_again()
            assert [replica.uri for replica in verifiers.replicas] == [second_address]
            reasons = ("UNAVAILABLE", "the server ended the health watch")
            assert any(f"{second_address}: {reason}" in verifiers.describe() for reason in reasons)
            assert f"{NAME}: the name cannot be resolved: no answer" in verifiers.describe()
        finally:
            await verifiers.close()


async def test_names_may_share_an_address() -> None:
    """Both names lose the address at once, and both are still followed."""
    shared = "ipv4:127.0.0.1:1"
    addresses = {"dns:///one:1": [shared], "dns:///other:1": [shared]}

    async def resolve(uri: str) -> Sequence[str]:
        return addresses[uri]

    verifiers = make_verifier_set(list(addresses), "", resolve=resolve, resolve_interval_s=0.01)

    def uris() -> list[str]:
        return sorted(replica.uri for replica in verifiers.replicas)

    try:
        await eventually(lambda: uris() == [shared])
        for uri in addresses:
            addresses[uri] = []
        await eventually(lambda: uris() == [])
        for port, uri in enumerate(addresses):
            addresses[uri] = [f"ipv4:127.0.0.2:{port + 1}"]
        await eventually(lambda: uris() == ["ipv4:127.0.0.2:1", "ipv4:127.0.0.2:2"])
    finally:
        await verifiers.close()


async def test_a_name_nobody_knows_is_said_to_be_the_reason() -> None:
    names = NameServer()
    names.addresses = None
    verifiers = make_verifier_set([NAME], "", resolve=names.resolve, resolve_interval_s=0.01)
    try:
        await names.asked_again()
        with pytest.raises(UnavailableError, match="cannot be resolved"):
            verifiers.pick()
    finally:
        await verifiers.close()


async def test_the_systems_resolver() -> None:
    assert "ipv4:127.0.0.1:7" in await resolve_name("dns:///localhost:7")
    assert await resolve_name("dns:127.0.0.1:8") == ["ipv4:127.0.0.1:8"]
    for name in ("no-such-host.invalid", "an..empty-label", "x" * 64 + ".too-long"):
        with pytest.raises(OSError, match=r"."):
            await resolve_name(f"dns:///{name}:7")
