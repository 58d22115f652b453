"""Verifier and drafter of two users on one host: the drafter reads target state, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.client.gateway_info import DrafterServiceInfo, StateLinkInfo
from specdec.local.processes import Service, free_ports
from tests.other_users import User, open_folder
from tests.probe_service import probe_command, service_group, verifier_command
from tests.systems import running_gateway

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SIZE = {"max_new_tokens": 60, "ignore_eos": True}
VERIFIER, DRAFTER = User(64_001, 64_000), User(64_002, 64_000)
STRANGER = User(64_003, 64_003)
GROUP = ("--shared-group", str(VERIFIER.gid))
KEY = b"a private key"
ATTEMPTS = """
import json, os, pathlib, sys
pid, key, *files = sys.argv[1:]
process = pathlib.Path("/proc", pid)
attempts = {
    "read key": lambda: open(key),
    "read key by the verifier's root": lambda: open(f"{process}/root{key}"),
    "read environment": lambda: open(process / "environ").read(),
    "read memory": lambda: open(process / "mem", "rb"),
    "list files": lambda: os.listdir(process / "fd"),
    "send signals": lambda: os.kill(int(pid), 0),
    "read state": lambda: open(files[0], "rb").read(1),
    "write state": lambda: open(files[0], "r+b"),
    "shorten state": lambda: os.truncate(files[0], 0),
    "remove state": lambda: os.unlink(files[0]),
    "add state": lambda: open(os.path.dirname(files[0]) + "/another.state", "wb"),
}
done = []
for name, attempt in attempts.items():
    try:
        attempt()
        done.append(name)
    except PermissionError:
        pass
print(json.dumps(done))
"""


@pytest.fixture
def folder(tiny_llama: Path) -> Iterator[Path]:
    """Return a folder with a model, a key of the verifier's user, and a place for state."""
    with open_folder() as path:
        shutil.copytree(tiny_llama, path / "model", copy_function=shutil.copyfile)
        (path / "model").chmod(0o755)
        (path / "shm").mkdir()
        (path / "shm").chmod(0o1777)
        (path / "key.pem").write_bytes(KEY)
        os.chown(path / "key.pem", VERIFIER.uid, VERIFIER.gid)
        (path / "key.pem").chmod(0o400)
        yield path


@asynccontextmanager
async def running_pair(
    folder: Path, verifier: tuple[str, ...], drafter: tuple[str, ...]
) -> AsyncIterator[tuple[AsyncClient, Service]]:
    """Run a verifier and a drafter of two users with these options; yield a client, and the verifier."""
    shared = ("--shared-dir", str(folder / "shm"))
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    commands = (
        VERIFIER.runs(verifier_command(addresses[0], folder / "model", *shared, *verifier), folder),
        DRAFTER.runs(probe_command(addresses[1], 5, *shared, *drafter), folder),
    )
    named = dict(zip(("verifier", "drafter"), zip(addresses, commands, strict=True), strict=True))
    group = service_group(folder / "logs", named)
    await asyncio.to_thread(group.start)
    try:
        async with (
            running_gateway(folder / "model", verifier=addresses[0], drafter=addresses[1]) as (address, _),
            AsyncClient(address, timeout_s=60) as client,
        ):
            yield client, group.services[0]
    finally:
        await asyncio.to_thread(group.stop, 5)


async def draft(client: AsyncClient) -> tuple[Generation, StateLinkInfo]:
    """Generate with drafts that read target state; return the answer and how the state was read."""
    options = GenerateOptions(method="probe", draft_depth=4, **SIZE)
    async with client.stream(PROMPT, options) as stream:
        for _ in range(5):
            await anext(stream)
        (drafter,) = (await client.info()).drafters
        async for _ in stream:
            pass
    assert isinstance(drafter.info, DrafterServiceInfo)
    (link,) = drafter.info.state_links
    return stream.result, link


def attempted(user: User, folder: Path, verifier: Service, file: Path) -> set[str]:
    """Return what a user can do to a verifier and a file of its state."""
    arguments = (str(verifier.pid), str(folder / "key.pem"), str(file))
    return set(json.loads(user.run([sys.executable, "-c", ATTEMPTS, *arguments], folder)))


async def test_a_group_shares_state_and_nothing_else(folder: Path) -> None:
    async with running_pair(folder, GROUP, GROUP) as (client, verifier):
        plain = await client.generate(PROMPT, GenerateOptions(method="none", **SIZE))
        answer, link = await draft(client)
        assert answer.token_ids == plain.token_ids
        assert answer.speculation.num_fallback_rounds == 0
        assert (link.storage, link.fallback_reason) == ("shared_memory", "")

        (directory,) = (folder / "shm").iterdir()
        files = list(directory.iterdir())
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in (directory, *files)}
        assert owners == {(VERIFIER.uid, VERIFIER.gid)}
        assert attempted(DRAFTER, folder, verifier, files[0]) == {"read state"}
        assert attempted(STRANGER, folder, verifier, files[0]) == set()
        # What the drafter could do as one user with the verifier.
        (unused := directory / "unused").write_bytes(b"0")
        os.chown(unused, VERIFIER.uid, VERIFIER.gid)
        as_owner = attempted(VERIFIER, folder, verifier, unused)
        (directory / "another.state").unlink()
        assert {"read key by the verifier's root", "read memory", "send signals", "add state"} <= as_owner
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("verifier", "drafter"), [((), GROUP), (GROUP, ())], ids=["verifier", "drafter"])
async def test_state_is_streamed_where_one_of_the_two_is_told_of_no_group(
    verifier: tuple[str, ...], drafter: tuple[str, ...], folder: Path
) -> None:
    async with running_pair(folder, verifier, drafter) as (client, _):
        answer, link = await draft(client)
        assert answer.speculation.num_fallback_rounds == 0
        assert link.storage == "stream"
        assert "Permission denied" in link.fallback_reason or "--shared-group" in link.fallback_reason
