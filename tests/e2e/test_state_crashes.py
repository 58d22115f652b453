"""Services that share target state are killed: whoever is left goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.contract.target_state import StateStorage
from specdec.local.processes import Service, free_ports
from tests.probe_service import probe_command, service_group, verifier_command
from tests.raw_streams import until
from tests.slow import quick_only
from tests.state_probe import StateProbe, all_of, assert_never_changed
from tests.systems import running_drafter, running_gateway, running_system, running_verifier
from verifier_service.server import VerifierServer

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
NUM_TOKENS = 120
PLAIN = GenerateOptions(max_new_tokens=NUM_TOKENS, ignore_eos=True, method="none")
READING = GenerateOptions(max_new_tokens=NUM_TOKENS, ignore_eos=True, method="probe", draft_depth=1)
READING_MS = 10
"""How long a drafter of these tests reads in each round: nearly all of the time."""


def files_in(shared_dir: Path) -> set[str]:
    """Return the names of the state files in a directory."""
    return {path.name for path in (shared_dir / f"specdec-{os.getuid()}").iterdir()}


def files_of(shared_dir: Path, pid: int) -> set[str]:
    """Return the names of the state files that a process has mapped."""
    mapped = {Path(line.split()[-1]).name for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    return files_in(shared_dir) & mapped


async def assert_nothing_is_held(server: VerifierServer) -> None:
    """Check that no session exports or streams state, and that no block of the pool is taken."""
    verifier = server.servicer.verifier
    assert verifier is not None
    await until(lambda: verifier.export.num_streams == verifier.export.num_sessions == 0)
    await until(lambda: verifier.pool.free_tokens == verifier.pool.capacity_tokens)
    assert verifier.num_sessions == 0


@asynccontextmanager
async def running_processes(log_dir: Path, **commands: tuple[str, ...]) -> AsyncIterator[list[Service]]:
    """Run services by name; each command line names its address after --listen."""
    addressed = {
        name: (command[command.index("--listen") + 1], command) for name, command in commands.items()
    }
    group = service_group(log_dir, addressed)
    await asyncio.to_thread(group.start)
    try:
        yield group.services
    finally:
        await asyncio.to_thread(group.stop, 5)


@pytest.mark.parametrize("mode", quick_only(["handle", "stream"], ["handle"]))
async def test_a_drafter_killed_while_it_reads_costs_nothing_but_speed(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    options = ("--target-state", mode, "--shared-dir", str(tmp_path))
    command = probe_command(f"127.0.0.1:{free_ports(1)[0]}", READING_MS, *options)
    async with running_verifier(tiny_llama, shared_dir=str(tmp_path)) as (verifier_at, server):
        verifier = server.servicer.verifier
        assert verifier is not None
        async with running_processes(tmp_path / "logs", drafter=command) as (drafter,):
            async with (
                running_gateway(tiny_llama, verifier=verifier_at, drafter=drafter.spec.address) as (at, _),
                AsyncClient(at, timeout_s=60) as client,
            ):
                expected = await client.generate(PROMPT, PLAIN)
                async with client.stream(PROMPT, READING) as stream:
                    for _ in range(20):
                        await anext(stream)
                    assert verifier.export.num_sessions == 1
                    assert verifier.export.num_streams == (mode == "stream")
                    os.kill(drafter.pid, signal.SIGKILL)
                    async for _ in stream:
                        pass
                speculation = stream.result.speculation
                assert stream.result.token_ids == expected.token_ids
                assert 0 < speculation.num_fallback_rounds < speculation.num_rounds
                assert drafter.spec.address in speculation.fallback_reason
            await assert_nothing_is_held(server)
            await until(lambda: drafter.exit_code == -signal.SIGKILL)
        assert files_in(tmp_path)  # the verifier's, which none of this concerned
    assert not files_in(tmp_path)


async def test_a_verifier_killed_leaves_files_that_are_swept_and_others_their_own(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shared = ("--shared-dir", str(tmp_path))
    first, second = (f"127.0.0.1:{port}" for port in free_ports(2))
    processes = {
        "verifier_read": verifier_command(first, tiny_llama, *shared),
        "verifier_idle": verifier_command(second, tiny_llama, *shared),
    }
    probe = StateProbe(all_of("llama"))
    here = {"shared_dir": str(tmp_path)}
    async with (
        running_verifier(tiny_llama, **here) as (survivor_at, survivor),
        running_drafter("probe", families=probe.families, target_state="handle", **here) as (drafter_at, _),
        running_processes(tmp_path / "logs", **processes) as (read, idle),
    ):
        async with (
            running_gateway(tiny_llama, verifier=read.spec.address, drafter=drafter_at) as (lost_at, _),
            running_gateway(tiny_llama, verifier=survivor_at, drafter=drafter_at) as (kept_at, _),
            AsyncClient(lost_at, timeout_s=60) as losing,
            AsyncClient(kept_at, timeout_s=60) as keeping,
        ):
            expected = await keeping.generate(PROMPT, PLAIN)
            async with keeping.stream(PROMPT, READING) as kept:
                await anext(kept)
                async with losing.stream(PROMPT, READING) as lost:
                    for _ in range(20):
                        await anext(lost)
                    files_of_read, files_of_idle = files_of(tmp_path, read.pid), files_of(tmp_path, idle.pid)
                    files_of_survivor = files_in(tmp_path) - files_of_read - files_of_idle
                    assert len(files_of_read) > len(files_of_idle) > 1  # hidden states are one by one
                    os.kill(read.pid, signal.SIGKILL)
                    with pytest.raises(UnavailableError):
                        async for _ in lost:
                            pass
                # The drafter's last session with the killed verifier ends: it removes what was left.
                await until(lambda: files_in(tmp_path) == files_of_survivor | files_of_idle)
                async for _ in kept:
                    pass
            assert kept.result.token_ids == expected.token_ids
            assert kept.result.speculation.num_fallback_rounds == 0
            await assert_nothing_is_held(survivor)

        os.kill(idle.pid, signal.SIGKILL)
        await until(lambda: idle.exit_code == -signal.SIGKILL)
        assert files_in(tmp_path) == files_of_survivor | files_of_idle
        async with running_verifier(tiny_llama, **here):  # the next to start removes it
            assert not files_in(tmp_path) & files_of_idle
            assert files_in(tmp_path) > files_of_survivor
        assert files_in(tmp_path) == files_of_survivor
    assert len(probe.sessions) == 2
    for session in probe.sessions:
        assert session.storages == {StateStorage.SHARED_MEMORY}
        assert_never_changed(session.readings)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_a_client_that_goes_away_frees_its_state(mode: str, tiny_llama: Path, tmp_path: Path) -> None:
    here = {"shared_dir": str(tmp_path)}
    probe = StateProbe(all_of("llama"), after_reading=lambda _: time.sleep(READING_MS / 1000))
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options=here,
        drafter_options={**here, "target_state": mode},
    ) as system:
        verifier, drafter = system.verifier.servicer.verifier, system.drafter.servicer.host
        assert verifier is not None
        assert drafter is not None
        assert drafter.reader is not None
        expected = await system.client.generate(PROMPT, PLAIN)
        async with system.client.stream(PROMPT, READING) as stream:
            for _ in range(10):
                await anext(stream)
            assert verifier.export.num_sessions == len(drafter.reader.links) == 1
            assert verifier.export.num_streams == (mode == "stream")
        await assert_nothing_is_held(system.verifier)
        await until(lambda: drafter.num_sessions == len(drafter.reader.links) == 0)
        assert drafter.reader.mirrors.num_used == 0
        assert (await system.client.generate(PROMPT, READING)).token_ids == expected.token_ids
    assert not files_in(tmp_path)
