"""Verifier and drafter in network namespaces of their own, each with its own memory-backed directory: they
stream state without being told to."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from specdec.client import AsyncClient, GenerateOptions
from specdec.client.gateway_info import DrafterServiceInfo, VerifierInfo
from tests.probe_service import probe_command, service_group, verifier_command
from tests.systems import running_gateway

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PORT = 50099
NETWORK = "198.18.77"
"""Of a range that is set aside for tests of networks."""
PRIVATE_SHM = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@dataclass(frozen=True)
class Namespaces:
    """Two network namespaces, joined to each other and to ours."""

    verifier: str
    drafter: str

    verifier_at = f"{NETWORK}.2:{PORT}"
    """The verifier as we reach it."""
    drafter_at = f"{NETWORK}.6:{PORT}"
    """The drafter as we reach it."""
    advertised = f"{NETWORK}.9:{PORT}"
    """The verifier as the drafter reaches it, and only the drafter."""

    def inside(self, name: str, command: tuple[str, ...]) -> tuple[str, ...]:
        """Return the command line that runs a command in a namespace, with a /dev/shm of its own."""
        ip = shutil.which("ip")
        assert ip
        return (ip, "netns", "exec", name, "unshare", "-m", "sh", "-c", PRIVATE_SHM, "sh", *command)


def join(ours: tuple[str, str], theirs: tuple[str, str], names: tuple[str, str]) -> None:
    """Connect two namespaces ("": this process's) by a virtual cable; an end is (namespace, address/bits)."""
    run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for (namespace, address), name in zip((ours, theirs), names, strict=True):
        if namespace:
            run("ip", "link", "set", name, "netns", namespace)
        prefix = ("ip", "-n", namespace) if namespace else ("ip",)
        run(*prefix, "addr", "add", address, "dev", name)
        run(*prefix, "link", "set", name, "up")


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    """Make two namespaces, and remove them and their cables afterwards."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs the commands ip and unshare")
    tag = f"sd{os.getpid()}"
    made = Namespaces(f"{tag}-verifier", f"{tag}-drafter")
    with ExitStack() as stack:
        try:
            for name in (made.verifier, made.drafter):
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "del", name)
                run("ip", "-n", name, "link", "set", "lo", "up")
                run(*made.inside(name, ("true",)))
            join(("", f"{NETWORK}.1/30"), (made.verifier, f"{NETWORK}.2/30"), (f"{tag}a", f"{tag}b"))
            join(("", f"{NETWORK}.5/30"), (made.drafter, f"{NETWORK}.6/30"), (f"{tag}c", f"{tag}d"))
            join(
                (made.verifier, f"{NETWORK}.9/30"), (made.drafter, f"{NETWORK}.10/30"), (f"{tag}e", f"{tag}f")
            )
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made


@pytest.mark.slow
async def test_state_is_streamed_between_hosts(
    namespaces: Namespaces, tiny_llama: Path, tmp_path: Path
) -> None:
    everywhere = f"0.0.0.0:{PORT}"
    verifier = verifier_command(everywhere, tiny_llama, "--advertise", namespaces.advertised)
    drafter = probe_command(everywhere, 5, "--verifier-allow", namespaces.advertised)
    group = service_group(
        tmp_path,
        {
            "verifier": (namespaces.verifier_at, namespaces.inside(namespaces.verifier, verifier)),
            "drafter": (namespaces.drafter_at, namespaces.inside(namespaces.drafter, drafter)),
        },
    )
    await asyncio.to_thread(group.start)
    try:
        async with (
            running_gateway(tiny_llama, verifier=namespaces.verifier_at, drafter=namespaces.drafter_at) as (
                address,
                _,
            ),
            AsyncClient(address, timeout_s=60) as client,
        ):
            options = {"max_new_tokens": 80, "ignore_eos": True, "draft_depth": 4}
            plain = await client.generate(PROMPT, GenerateOptions(method="none", **options))
            async with client.stream(PROMPT, GenerateOptions(method="probe", **options)) as stream:
                for _ in range(10):
                    await anext(stream)
                info = await client.info()
                async for _ in stream:
                    pass
    finally:
        await asyncio.to_thread(group.stop, 5)
    assert stream.result.token_ids == plain.token_ids
    assert stream.result.speculation.num_fallback_rounds == 0
    assert stream.result.speculation.num_draft_tokens > 0
    (verifier_info,), (drafter_info,) = info.verifiers, info.drafters
    assert isinstance(verifier_info.info, VerifierInfo)
    assert verifier_info.info.state_storage == "shared_memory"  # to whoever shares its host
    assert verifier_info.info.num_state_streams == 1
    assert isinstance(drafter_info.info, DrafterServiceInfo)
    (link,) = drafter_info.info.state_links
    assert (link.storage, link.verifier_uri) == ("stream", namespaces.advertised)
    assert "state file cannot be" in link.fallback_reason
    assert "target state is streamed" in (tmp_path / "drafter.log").read_text()
    assert {service.exit_code for service in group.services} == {0}
