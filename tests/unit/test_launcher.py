"""The launcher, with small real processes that answer health checks in place of the services."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
)
from specdec.local import probe
from specdec.local.launcher import LocalSystem, SystemConfig, service_specs
from specdec.local.processes import ServiceGroup, ServiceSpec, free_ports
from specdec.local.state_file import (
    SystemState,
    held_locks,
    lock_owner,
    read_live_state,
    remove_state,
    sole_supervisor,
    state_dir,
    write_state,
)
from specdec.local.supervisor import RestartPolicy, Supervisor, _Record
from specdec.local.up import run_detached, stop_running, stop_starting

NAMES = ("gateway", "drafter", "verifier")

FAKE_SERVICE = """
import signal, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

name, address, mode, journal = sys.argv[1:]
print(f"{name} starts", flush=True)
if mode == "fail":
    print("error: the model is missing", flush=True)
    sys.exit(3)
status = health_pb2.HealthCheckResponse.SERVING
servicer = health.HealthServicer()
servicer.set(f"test.{name}", status if mode != "never-ready" else health_pb2.HealthCheckResponse.NOT_SERVING)
server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port(address)
server.start()
if mode == "stubborn":
    child = subprocess.Popen(["sleep", "600"])
    print(f"child {child.pid}", flush=True)
stopped = threading.Event()
def stop(*_):
    with open(journal, "a") as file:
        file.write(name + "\\n")
    if mode != "stubborn":
        stopped.set()
signal.signal(signal.SIGTERM, stop)
while not stopped.wait(0.05):
    pass
server.stop(0).wait()
"""

FAKE_UP = """
import json, sys
from pathlib import Path
from specdec.contract.errors import SpecdecError
from specdec.local.state_file import sole_supervisor
from specdec.local.processes import ServiceGroup, ServiceSpec
from specdec.local.up import supervise

specs = [ServiceSpec(**{**fields, "command": tuple(fields["command"])}) for fields in json.loads(sys.argv[1])]
logs = Path(sys.argv[2])
try:
    with sole_supervisor():
        supervise(ServiceGroup(specs, logs, ready_timeout_s=20), logs, report=print, announce=print)
except SpecdecError as error:
    sys.exit(f"error: {error}")
"""


class Fakes:
    """Specs of fake services in a directory, and what they left there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs = directory / "logs"
        (directory / "service.py").write_text(FAKE_SERVICE)
        (directory / "up.py").write_text(FAKE_UP)

    def specs(self, **modes: str) -> list[ServiceSpec]:
        """Return the specs of the three services; `modes` by name: "fail", "never-ready", "stubborn"."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(len(NAMES))]
        return [
            ServiceSpec(
                name=name,
                address=address,
                command=(
                    *(sys.executable, str(self.directory / "service.py")),
                    *(name, address, modes.get(name, "serve"), str(self.directory / "journal")),
                ),
                health_service=f"test.{name}",
            )
            for name, address in zip(NAMES, addresses, strict=True)
        ]

    def group(self, ready_timeout_s: float = 20.0, **modes: str) -> ServiceGroup:
        return ServiceGroup(self.specs(**modes), self.logs, ready_timeout_s=ready_timeout_s)

    def up_command(self, **modes: str) -> list[str]:
        specs = [
            {
                "name": spec.name,
                "address": spec.address,
                "command": spec.command,
                "health_service": spec.health_service,
            }
            for spec in self.specs(**modes)
        ]
        return [sys.executable, str(self.directory / "up.py"), json.dumps(specs), str(self.logs)]

    @property
    def stop_order(self) -> list[str]:
        return (self.directory / "journal").read_text().split()


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "state"
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(directory))
    yield directory
    stop_running()


def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def some_state(pid: int, started_at: float) -> SystemState:
    return SystemState(pid, started_at, "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", {"gateway": 1}, "/logs")


def test_services_start_and_stop_gateway_first(fakes: Fakes) -> None:
    with fakes.group() as group:
        pids = group.pids
        assert set(pids) == set(NAMES)
        assert all(is_serving(service.spec) for service in group.services)
    assert fakes.stop_order == ["gateway", "drafter", "verifier"]
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


def test_a_service_that_fails_at_start_shows_its_log(fakes: Fakes) -> None:
    group = fakes.group(drafter="fail")
    with pytest.raises(UnavailableError, match="drafter stopped with exit code 3") as caught:
        group.start()
    assert "error: the model is missing" in str(caught.value)
    assert all(service.exit_code is not None for service in group.services)


def test_a_service_that_is_not_ready_in_time_is_named(fakes: Fakes) -> None:
    with pytest.raises(UnavailableError, match=r"verifier was not ready after 3 s") as caught:
        fakes.group(ready_timeout_s=3, verifier="never-ready").start()
    assert "verifier starts" in str(caught.value)


def test_a_start_can_be_given_up(fakes: Fakes) -> None:
    group = fakes.group(verifier="never-ready")
    timer = threading.Timer(0.5, group.stopping.set)
    timer.start()
    with pytest.raises(RequestCancelledError):
        group.start()
    timer.join()
    assert all(service.exit_code is not None for service in group.services)


@pytest.mark.parametrize("ended_by", ["the time limit", "a signal"])
def test_a_start_ends_though_the_health_checks_hang(fakes: Fakes, ended_by: str) -> None:
    group = fakes.group(ready_timeout_s=3 if ended_by == "the time limit" else 60, verifier="never-ready")

    def hang() -> None:
        eventually(lambda: bool(probes()))
        probes()[0].suspend()
        if ended_by == "a signal":
            group.stopping.set()

    thread = threading.Thread(target=hang)
    thread.start()
    with pytest.raises((UnavailableError, RequestCancelledError)) as caught:
        group.start()
    thread.join()
    assert isinstance(caught.value, UnavailableError) == (ended_by == "the time limit")
    assert all(service.exit_code is not None for service in group.services)
    assert probes() == []


def probes() -> list[psutil.Process]:
    """Return the processes that ask for the health of services that this process starts."""
    return [child for child in psutil.Process().children() if probe.__name__ in child.cmdline()]


def test_a_probe_that_dies_is_started_again(fakes: Fakes) -> None:
    group = fakes.group()

    def kill() -> None:
        eventually(lambda: bool(probes()))
        probes()[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with group:
        thread.join()
        assert all(is_serving(service.spec) for service in group.services)


def test_a_service_that_ignores_the_signal_is_killed(fakes: Fakes) -> None:
    group = fakes.group(drafter="stubborn")
    group.start()
    child = int((fakes.logs / "drafter.log").read_text().rpartition("child ")[2].split()[0])
    assert psutil.pid_exists(child)
    group.stop(grace_s=0.5)
    assert [service.exit_code for service in group.services] == [0, -signal.SIGKILL, 0]
    eventually(lambda: not psutil.pid_exists(child))


def test_restarts_wait_longer_after_every_quick_death() -> None:
    service: Any = SimpleNamespace(started_at=0.0)
    record, policy, now = _Record(service), RestartPolicy(), 100.0
    delays_s = []
    for lived_s in (1, 1, 59, 1, 1, 1, 1, 60, 1):
        service.started_at, now = now, now + lived_s
        record.note_death(now, policy)
        assert record.restart_at is not None
        delays_s.append(record.restart_at - now)
    assert delays_s == [0.5, 1, 2, 4, 8, 10, 10, 0.5, 0.5]


def test_a_killed_service_is_started_again_on_its_address(fakes: Fakes) -> None:
    restarts: list[dict[str, int]] = []
    reports: list[str] = []
    with fakes.group() as group:
        supervisor = Supervisor(
            group,
            policy=RestartPolicy(first_delay_s=0.05),
            report=reports.append,
            on_restart=lambda: restarts.append(group.pids),
        )
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        before = group.pids
        os.kill(before["verifier"], signal.SIGKILL)
        eventually(lambda: len(restarts) == 1 and is_serving(group.services[2].spec))
        group.stopping.set()
        thread.join()
        assert restarts[0]["verifier"] != before["verifier"]
        assert restarts[0]["gateway"] == before["gateway"]
    assert "verifier was killed by SIGKILL" in reports[0]


def test_a_service_that_keeps_dying_ends_the_supervision(fakes: Fakes) -> None:
    policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, max_quick_deaths=3)
    with fakes.group() as group:
        marker = fakes.directory / "service.py"
        marker.write_text("import sys; sys.exit('no memory left')")
        os.kill(group.pids["drafter"], signal.SIGKILL)
        with pytest.raises(UnavailableError, match="drafter died 3 times in a row") as caught:
            Supervisor(group, policy=policy).run()
    assert "no memory left" in str(caught.value)


def test_services_do_not_outlive_a_killed_supervisor(fakes: Fakes, state: Path) -> None:
    command = fakes.up_command()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as supervisor:
        eventually(lambda: read_live_state() is not None)
        running = read_live_state()
        assert running is not None
        supervisor.kill()
        # Nobody has taken note of its death yet: what is left of it is a zombie.
        eventually(lambda: not running.is_alive)
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in running.pids.values()))
    assert (state / "system.json").exists()
    assert read_live_state() is None
    assert not (state / "system.json").exists()


def test_detached_system_is_found_refused_twice_and_stopped(fakes: Fakes, state: Path) -> None:
    running = run_detached(fakes.up_command(), timeout_s=30)
    assert read_live_state() == running
    assert os.getsid(running.supervisor_pid) == running.supervisor_pid
    with pytest.raises(FailedPreconditionError, match=r"specdec down") as caught:
        run_detached(fakes.up_command(), timeout_s=30)
    assert running.gateway in str(caught.value)
    assert stop_running() == running
    assert fakes.stop_order == ["gateway", "drafter", "verifier"]
    assert not any(psutil.pid_exists(pid) for pid in running.pids.values())
    assert list(state.glob("system.json*")) == []
    assert stop_running() is None


def test_the_state_follows_a_restart(fakes: Fakes, state: Path) -> None:
    running = run_detached(fakes.up_command(), timeout_s=30)
    os.kill(running.pids["drafter"], signal.SIGKILL)

    def is_new() -> bool:
        current = read_live_state()
        return current is not None and current.pids["drafter"] != running.pids["drafter"]

    eventually(is_new)


def test_the_system_outlives_its_state_directory(fakes: Fakes, state: Path, tmp_path: Path) -> None:
    running = run_detached(fakes.up_command(), timeout_s=30)
    supervisor = psutil.Process(running.supervisor_pid)
    drafter = supervisor.children()
    # A file in place of the directories: nothing can be written there, not even by root.
    for directory in (state, fakes.logs):
        directory.rename(tmp_path / f"{directory.name} aside")
        directory.touch()
    os.kill(running.pids["drafter"], signal.SIGKILL)
    eventually(
        lambda: (
            probe.is_serving(running.drafter, "test.drafter")
            and set(supervisor.children()) - set(drafter) != set()
        )
    )
    state.unlink()
    (tmp_path / "state aside").rename(state)
    assert read_live_state() == running
    assert stop_running() == running
    assert not supervisor.is_running()


def is_serving(spec: ServiceSpec) -> bool:
    return probe.is_serving(spec.address, spec.health_service)


def test_a_system_is_found_where_nothing_can_be_written(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = psutil.Process()
    written = some_state(me.pid, me.create_time())
    write_state(written)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert read_live_state() == written
    with pytest.raises(FailedPreconditionError, match=r"it is not writable.*SPECDEC_STATE_DIR"):
        state_dir()
    remove_state()  # does no harm where it cannot remove
    assert read_live_state() == written
    monkeypatch.undo()
    remove_state()
    assert read_live_state() is None


def detaching(command: list[str], prepare: str = "def prepare(): pass\n") -> subprocess.Popen[str]:
    """Start a process that runs a detached system, as `specdec up --detach` does."""
    program = (
        f"import sys, time\n{prepare}from specdec.contract.errors import SpecdecError\n"
        "from specdec.local.up import run_detached\n"
        "try:\n    print(run_detached(sys.argv[1:], timeout_s=60, prepare=prepare))\n"
        "except SpecdecError as error:\n    sys.exit(f'error: {error}')\n"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program, *command], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("lock", ["starting", "lock"])
def test_a_system_that_is_still_starting_is_stopped(fakes: Fakes, state: Path, lock: str) -> None:
    with detaching(fakes.up_command(verifier="never-ready")) as starter:
        eventually(lambda: state / lock in held_locks())
        assert stop_running() is None
        assert stop_starting(timeout_s=30)
        assert "stopped while" in starter.communicate(timeout=30)[1].lower()
    assert starter.returncode == 1
    assert held_locks() == []
    assert not stop_starting()
    assert read_live_state() is None


def test_a_system_does_not_go_on_starting_when_its_starter_is_killed(fakes: Fakes, state: Path) -> None:
    with detaching(fakes.up_command()) as starter:
        supervisors = psutil.Process(starter.pid).children
        eventually(lambda: bool(supervisors()))
        (supervisor,) = supervisors()
        starter.kill()
        eventually(lambda: not supervisor.is_running())
    assert held_locks() == []
    assert read_live_state() is None


def test_sigterm_is_not_lost_in_a_preparation_that_forgets_errors(fakes: Fakes, state: Path) -> None:
    prepare = """
def prepare():
    try:
        print("preparing", flush=True)
        time.sleep(60)
    except Exception:
        pass
"""
    with detaching(fakes.up_command(), prepare) as starter:
        assert starter.stdout
        assert starter.stdout.readline() == "preparing\n"
        starter.terminate()
        assert "stopped while it was starting" in starter.communicate(timeout=30)[1]
    assert starter.returncode == 1
    assert not fakes.logs.exists(), "nothing was started"


def test_a_process_that_only_has_the_pid_of_an_old_lock_is_left_alone(state: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with sole_supervisor():
            (state / "lock").write_text(f"{other.pid}\n")
            assert lock_owner(state / "lock") is None
            (state / "lock").write_text(f"{os.getpid()}\n")
            assert lock_owner(state / "lock") == psutil.Process()
        other.communicate(b"\n")


def test_a_detached_failure_is_told_as_the_supervisor_told_it(fakes: Fakes, state: Path) -> None:
    with pytest.raises(UnavailableError, match=r"^The gateway stopped with exit code 3") as caught:
        run_detached(fakes.up_command(gateway="fail"), timeout_s=30)
    assert "the model is missing" in str(caught.value)
    assert read_live_state() is None


def test_a_detached_system_that_is_late_is_stopped(fakes: Fakes, state: Path) -> None:
    with pytest.raises(UnavailableError, match="not ready after 2 s"):
        run_detached(fakes.up_command(verifier="never-ready"), timeout_s=2)

    def is_gone() -> bool:
        try:
            with sole_supervisor():
                return True
        except FailedPreconditionError:
            return False

    eventually(is_gone)
    assert read_live_state() is None


def test_state_is_private_and_reads_back(state: Path) -> None:
    me = psutil.Process()
    written = some_state(me.pid, me.create_time())
    write_state(written)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / "system.json").stat().st_mode) == 0o600
    assert read_live_state() == written
    remove_state()
    assert read_live_state() is None


@pytest.mark.parametrize("pid", [2**22 + 1, os.getpid()], ids=["no-such-process", "pid-used-again"])
def test_state_of_a_system_that_is_gone_is_cleaned_up(state: Path, pid: int) -> None:
    write_state(some_state(pid, started_at=1.0))
    assert read_live_state() is None
    assert not (state / "system.json").exists()


@pytest.mark.parametrize("content", ["", "{", '{"version": 99}', "[1]", '"text"', "\x00"])
def test_unreadable_state_is_no_system(state: Path, content: str) -> None:
    (state_dir() / "system.json").write_text(content)
    assert read_live_state() is None


def test_state_directory_falls_back_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/none")
    assert state_dir().is_relative_to(tmp_path / "cache")
    assert state_dir() == state_dir()  # platformdirs warns of the missing directory once only
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state_dir().is_relative_to(tmp_path / "specdec")


def test_only_one_supervisor_at_a_time(state: Path) -> None:
    with sole_supervisor(), pytest.raises(FailedPreconditionError, match="runs already"), sole_supervisor():
        pass
    with sole_supervisor():
        pass


def test_service_commands() -> None:
    config = SystemConfig(
        model="org/model",
        dtype="float32",
        drafters=("ngram", "causal-lm:org/small"),
        target_state="stream",
        threads=3,
        kv_cache_mib=96.0,
        extra_args={"verifier": ["--max-sessions", "8"]},
    )
    gateway, drafter, verifier = service_specs(config)
    assert gateway.command[1:] == (
        *("-m", "gateway", "--listen", gateway.address),
        *("--verifier", verifier.address, "--drafter", drafter.address, "--tokenizer", "org/model"),
        *("--http-listen", gateway.http.removeprefix("http://")),
    )
    assert len({gateway.http, drafter.http, verifier.http}) == 2, "only the gateway has one"
    assert drafter.command[1:] == (
        *("-m", "drafter_service", "--listen", drafter.address),
        *("--target", "org/model", "--verifier-allow", verifier.address),
        *("--drafter", "ngram", "--drafter", "causal-lm:org/small"),
        *("--dtype", "float32", "--device", "cpu", "--target-state", "stream", "--threads", "3"),
    )
    assert verifier.command[1:] == (
        *("-m", "verifier_service", "--listen", verifier.address),
        *("--model", "org/model", "--kv-cache-mib", "96.0"),
        *("--dtype", "float32", "--device", "cpu", "--target-state", "stream", "--threads", "3"),
        *("--max-sessions", "8"),
    )
    assert [spec.health_service for spec in (gateway, drafter, verifier)] == [
        "specdec.v1.GatewayService",
        "specdec.v1.DrafterService",
        "specdec.v1.VerifierService",
    ]


@pytest.mark.parametrize(
    ("model", "drafters", "needed"),
    [("default", ("ngram",), True), ("x", ("ngram",), False), ("x", ("causal-lm:default",), True)],
)
def test_the_embedded_model_is_fetched_only_if_used(
    model: str, drafters: tuple[str, ...], needed: bool
) -> None:
    assert SystemConfig(model=model, drafters=drafters).needs_default_model is needed


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for config in (SystemConfig(gateway_port=port), SystemConfig(http_port=port)):
            with pytest.raises(UnavailableError, match=rf"Port {port} .* another --port"):
                service_specs(config)


def test_grpc_and_http_need_a_port_each() -> None:
    (port,) = free_ports(1)
    with pytest.raises(InvalidArgumentError, match=f"--port and --http-port are both {port}"):
        service_specs(SystemConfig(gateway_port=port, http_port=port))


def test_without_the_extra_there_is_no_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    gateway, *_ = service_specs(SystemConfig())
    assert gateway.http == ""
    assert "--http-listen" not in gateway.command
    with pytest.raises(FailedPreconditionError, match=r'pip install "specdec\[http\]"'):
        service_specs(SystemConfig(http_port=1))


def test_local_system_names_the_service_that_failed(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-model")
    with (
        pytest.raises(UnavailableError, match="stopped with exit code"),
        LocalSystem(missing, log_dir=tmp_path / "logs", ready_timeout_s=60),
    ):
        pass
