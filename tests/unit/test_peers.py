"""Peers of a benchmark: their programs, how these are started and ended, and what openvino needs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from specdec.bench.cli import bench
from specdec.bench.peers import openvino_export
from specdec.bench.peers.engines import PeerSetup, PeerTarget
from specdec.bench.peers.process import PeerBackend, output_of
from specdec.bench.peers.worker import Served, TokenClock, answer_passes, finish_reason, serve
from specdec.bench.workload import Prompt
from specdec.client import GenerateOptions
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from tests.integration.gated_drafter import eventually
from tests.peers_environment import NEEDS_OPENVINO
from tests.scripted_peer import BUSY_RUN, END, FAIL, HANG, IDLE_RUN, pid_of, prompt, scripted
from tests.tiny_chat import greedy, save_tiny_chat_model

PROMPT = Prompt(0, "a", "w5 w9 w11", token_ids=(5, 9, 11, 127))
DESCRIPTION = {"versions": {}, "threads": 1, "precision": "float32"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def target_of(folder: Path, dtype: str = "float32", device: str = "cpu") -> PeerTarget:
    return PeerTarget(str(folder), folder.name, dtype, device)


# The program's side


class Cache:
    """Passes that take as many nanoseconds as the cache and the pass have tokens."""

    def __init__(self) -> None:
        self.cached: list[int] = []

    def fill_cache(self, token_ids: list[int]) -> None:
        self.cached = token_ids

    def time_pass(self, token_ids: list[int]) -> int:
        elapsed_ns = len(self.cached) + len(token_ids)
        self.cached = [*self.cached, token_ids[0]]
        return elapsed_ns


def replies_to(*lines: str) -> list[dict[str, object]]:
    replies = io.StringIO()
    serve(Served(DESCRIPTION, answer_passes(Cache())), io.StringIO("".join(lines)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_a_worker_says_that_it_is_ready_and_answers_each_line() -> None:
    replies = replies_to('{"context_token_ids": [1, 2]}\n', *['{"pass_token_ids": [3, 4, 5]}\n'] * 2)
    assert replies == [{"ready": True, **DESCRIPTION}, {}, {"pass_ns": 5}, {"pass_ns": 6}]


def test_a_request_that_fails_does_not_end_the_worker() -> None:
    replies = replies_to("not json\n", '{"pass_token_ids": []}\n', '{"pass_token_ids": [3]}\n')
    assert [set(reply) for reply in replies[1:]] == [{"error"}, {"error"}, {"pass_ns"}]
    assert str(replies[2]["error"]).startswith("IndexError: ")


def test_times_per_token_leave_out_all_tokens_that_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([10.0, 10.5, 10.7, 11.1])
    monkeypatch.setattr("time.perf_counter", lambda: next(now_s))
    clock = TokenClock()
    clock.note(2)
    assert clock.times() == {"ttft_ms": pytest.approx(500), "tpot_ms": None, "total_ms": pytest.approx(500)}
    clock.note(1)
    clock.note(3)
    assert clock.times() == {
        "ttft_ms": pytest.approx(500),
        "tpot_ms": pytest.approx(600 / 4),
        "total_ms": pytest.approx(1100),
    }


def test_an_answer_ends_by_a_stop_token_or_by_its_length() -> None:
    assert finish_reason([1, 2], {2}) == "stop_token"
    assert finish_reason([2, 1], {2}) == "length"


# Peers that cannot start


async def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = ["--model", str(tmp_path / "nowhere"), "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    command = [sys.executable, "-m", "specdec.bench.peers.transformers_worker", *folder]
    with pytest.raises(UnavailableError, match=r"The transformers worker ended(.|\n)*does not exist"):
        async with PeerBackend("transformers", command, GenerateOptions()):
            pass


async def test_a_model_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"has no tokenizer\.json"):
        await PeerSetup(target_of(tmp_path)).encode(["w1"])


def test_peers_do_not_load_another_model_than_the_services_run(tiny_model: Path) -> None:
    with pytest.raises(
        FailedPreconditionError, match="The services run other, but the peers would load tiny"
    ):
        PeerSetup(PeerTarget(str(tiny_model), "other", "float32", "cpu"))


# Workers that are started and ended


async def test_a_worker_outlives_a_failure_and_ends_with_the_block() -> None:
    async with scripted() as peer:
        with pytest.raises(InternalError, match="scripted failed on this prompt: ValueError: one"):
            await peer.generate(prompt(FAIL))
        pid = await pid_of(peer)
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    with pytest.raises(UnavailableError, match="not started"):
        await peer.generate(prompt(0))


async def test_a_worker_that_ends_by_itself_leaves_its_last_words() -> None:
    async with scripted() as peer:
        with pytest.raises(UnavailableError, match=r"ended by itself(.|\n)*so long"):
            await peer.generate(prompt(END))
        with pytest.raises(UnavailableError, match="ended by itself"):
            await peer.generate(prompt(0))


async def test_a_worker_that_does_not_answer_in_time_is_ended() -> None:
    async with scripted() as peer:
        pid = await pid_of(peer)
        peer._timeout_s = 0.2
        with pytest.raises(DeadlineExceededError, match=r"did not answer within 0\.2 s"):
            await peer.generate(prompt(HANG))
        await eventually(lambda: not is_running(pid))


async def test_an_error_in_the_block_ends_a_busy_worker() -> None:
    pids: list[int] = []

    async def fail_beside_a_request() -> None:
        async with scripted() as peer, asyncio.TaskGroup() as group:
            pids.append(await pid_of(peer))
            group.create_task(peer.generate(prompt(HANG)))
            await asyncio.sleep(0)
            raise RuntimeError("elsewhere")

    with pytest.raises(ExceptionGroup) as caught:
        await fail_beside_a_request()
    assert caught.group_contains(RuntimeError, match="elsewhere")
    assert not psutil.pid_exists(pids[0])


@pytest.fixture
def busy_run() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", BUSY_RUN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        yield process, int(process.stdout.readline())
        process.kill()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the run alone", "a terminal's Ctrl-C"])
def test_an_interrupt_ends_the_run_and_its_busy_worker(
    busy_run: tuple[subprocess.Popen[str], int], send: object
) -> None:
    process, worker_pid = busy_run
    assert callable(send)
    send(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not is_running(worker_pid)


async def test_an_idle_worker_does_not_outlive_a_run_that_is_killed() -> None:
    worker_pid = await asyncio.to_thread(start_and_kill_idle_run)
    await eventually(lambda: not is_running(worker_pid))


def start_and_kill_idle_run() -> int:
    command = [sys.executable, "-c", IDLE_RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        worker_pid = int(process.stdout.readline())
        process.kill()
    return worker_pid


# What openvino needs


@pytest.fixture
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    return tmp_path / "venv" / "peers"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.mark.parametrize("command", ["run", "pass"])
def test_without_its_environment_openvino_names_the_make_target(
    command: str, no_environment: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        bench, [command, "--peers", "transformers,openvino", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert f"needs an environment of its own in {no_environment}, which was not made" in result.output
    assert "Run `make .venv/peers/installed`" in result.output
    assert "Services ready" not in result.output


def test_the_makefile_makes_what_the_error_names() -> None:
    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    assert f"\n{openvino_export.MAKE_TARGET}: " in makefile.read_text()


@pytest.mark.parametrize("command", ["run", "pass"])
def test_a_peer_that_there_is_not_is_refused(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [command, "--peers", "vllm", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "no peer 'vllm'; there are transformers and openvino" in result.output


@pytest.fixture
def exporter(no_environment: Path) -> Path:
    """Make an environment whose exporter makes a folder; return the file where it notes its arguments."""
    (no_environment / "bin").mkdir(parents=True)
    (no_environment / "installed").touch()
    program = no_environment / "bin" / "optimum-cli"
    noted = no_environment / "noted"
    program.write_text(f'#!/bin/sh\necho "$@" >> {noted}\neval mkdir \\"\\${{$#}}\\"\n')
    program.chmod(0o755)
    return noted


def calls_of(exporter: Path) -> list[str]:
    return exporter.read_text().splitlines() if exporter.exists() else []


def contents(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def test_a_model_is_exported_once_for_each_type_of_weights(
    tiny_model: Path, exporter: Path, cache: Path
) -> None:
    lines: list[str] = []
    exports = [
        await openvino_export.exported(tiny_model, "someone/tiny", dtype, lines.append)
        for dtype in ("bfloat16", "bfloat16", "float32")
    ]
    assert exports[0] == exports[1]
    assert contents(cache) == sorted({*exports}), "nothing else is left"
    assert [path.name.rpartition("-")[2] for path in exports[1:]] == ["fp16", "fp32"]
    assert [line.split()[1] for line in lines] == ["someone/tiny"] * 2
    calls = calls_of(exporter)
    for kind, call in zip(("fp16", "fp32"), calls, strict=True):
        assert f"--weight-format {kind}" in call
    assert all(f"--model {tiny_model} " in call for call in calls)


async def test_weights_that_changed_are_exported_anew(tmp_path: Path, exporter: Path, cache: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for text in ("{}", '{"a": 1}'):
        (model / "config.json").write_text(text)
        await openvino_export.exported(model, "m", "float32", lambda _: None)
    assert len(calls_of(exporter)) == len(contents(cache)) == 2


async def test_an_export_that_fails_says_why_and_leaves_nothing(
    tiny_model: Path, exporter: Path, cache: Path
) -> None:
    (exporter.parent / "bin" / "optimum-cli").write_text(
        "#!/bin/sh\nmkdir $9\necho no such task >&2\nexit 1\n"
    )
    with pytest.raises(UnavailableError, match="no such task"):
        await openvino_export.exported(tiny_model, "tiny", "float32", lambda _: None)
    assert contents(cache) == []


async def test_a_cancelled_program_is_ended(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    script = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    task = asyncio.create_task(output_of([sys.executable, "-c", script]))
    await eventually(lambda: noted.exists() and noted.read_text() != "")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(int(noted.read_text()))


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cuda:0"), ("float64", "cpu")])
async def test_openvino_is_refused_where_it_cannot_run_what_the_services_run(
    tiny_model: Path, exporter: Path, dtype: str, device: str
) -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(FailedPreconditionError, match=f"the services run on {device} in {dtype}"):
            await PeerSetup(target_of(tiny_model, dtype, device)).start_passes(["openvino"], stack)
    assert calls_of(exporter) == []


# openvino, for real


@pytest.mark.slow
@NEEDS_OPENVINO
async def test_openvino_decodes_greedily_with_and_without_lookup(tiny_model: Path, cache: Path) -> None:
    setup = PeerSetup(target_of(tiny_model))
    await setup.encode([])
    async with AsyncExitStack() as stack:
        options = GenerateOptions(max_new_tokens=24)
        peers = await setup.start_answering(["openvino"], options, stack)
        answers = [await peer.generate(PROMPT) for peer in peers]
    expected = greedy(tiny_model, list(PROMPT.token_ids), 24)
    assert [answered.token_ids for answered in answers] == [expected] * 2
    assert {answered.finish_reason for answered in answers} == {"length"}
    assert all(answered.ttft_ms > 0 for answered in answers)
    assert [set(peer.description["versions"]) for peer in peers] == [{"openvino", "openvino-genai"}] * 2
    assert [peer.description["precision"] for peer in peers] == ["float32"] * 2
    assert len(contents(cache)) == 1


CROPPED = """
import sys
from pathlib import Path
from specdec.bench.peers.openvino_worker import OpenVinoPasses

engine, fresh = (OpenVinoPasses(Path(sys.argv[1]), "float32", 1) for _ in range(2))
engine.fill_cache([1, 2, 3])
assert engine.time_pass([4, 5, 6]) > 0
assert engine.time_pass([7]) > 0
fresh.fill_cache([1, 2, 3, 4, 7])
assert engine._run([8, 9]) == fresh._run([8, 9])
print("same")
"""
"""A pass keeps its first token alone."""


@pytest.mark.slow
@NEEDS_OPENVINO
async def test_a_pass_of_openvino_keeps_its_first_token(tiny_model: Path, cache: Path) -> None:
    folder = await openvino_export.exported(tiny_model, "tiny", "float32", lambda _: None)
    python = str(openvino_export.program("python"))
    assert (await output_of([python, "-c", CROPPED, str(folder)])).strip() == b"same"
