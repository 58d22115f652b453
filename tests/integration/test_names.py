"""A `dns:` name with several addresses: each is a replica, and they come and go with the name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

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

    async def resolve(self, uri: str) -> Sequence[str]:
        assert uri == NAME
        if self.addresses is None:
            raise OSError("no answer")
        return self.addresses


def ready(verifiers: VerifierSet) -> set[str]:
    return {replica.uri for replica in verifiers.replicas if replica.is_ready}


async def test_replicas_follow_the_addresses_of_a_name(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (one, first), running_verifier(tiny_llama) as (two, _):
        names = NameServer(one)
        verifiers = make_verifier_set(
            [NAME], vocabulary_fingerprint(tiny_llama), resolve=names.resolve, resolve_interval_s=0.02
        )
        try:
            await eventually(lambda: ready(verifiers) == {one})
            names.addresses = (one, two)
            await eventually(lambda: ready(verifiers) == {one, two})
            # One leaves: only it is lost, at once, and it goes away when the name no longer has it.
            await first.host.stop(0)
            await eventually(lambda: ready(verifiers) == {two})
            assert verifiers.pick().uri == two
            names.addresses = (two,)
            await eventually(lambda: [replica.uri for replica in verifiers.replicas] == [two])
            # A name server that fails takes nothing away.
            names.addresses = None
            await asyncio.sleep(0.1)
            assert verifiers.pick().uri == two
        finally:
            await verifiers.close()


async def test_a_name_nobody_knows_is_said_to_be_the_reason() -> None:
    names = NameServer()
    names.addresses = None
    verifiers = make_verifier_set([NAME], "", resolve=names.resolve)
    try:
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match="cannot be resolved"):
            verifiers.pick()
    finally:
        await verifiers.close()


async def test_the_systems_resolver() -> None:
    assert "ipv4:127.0.0.1:7" in await resolve_name("dns:///localhost:7")
    assert await resolve_name("dns:127.0.0.1:8") == ["ipv4:127.0.0.1:8"]
    with pytest.raises(OSError, match=r"."):
        await resolve_name("dns:///no-such-host.invalid:7")
