"""`specdec bench run --resume`: an interrupted run goes on where it was, with the same settings only."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from specdec.bench.journal import REQUESTS_FILE, SETTINGS_FILE
from specdec.bench.records import Answer, RequestRecord
from specdec.client import MethodRounds, ProposerStats, Speculation
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from tests.unit.test_bench import ScriptedGateway, bench_run, write_prompts

NUM_PROMPTS = 6
WAIT_S = 60.0


class PausingGateway(ScriptedGateway):
    """Answers a number of requests, and then none until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_free = 10**9
        self.is_reached = threading.Event()
        self.may_go_on = threading.Event()

    def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        if len(self.requests) >= self.num_free:
            self.is_reached.set()
            self.may_go_on.wait(WAIT_S)
            return
        yield from super().Generate(request, context)

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Return method and prompt of each request that was answered."""
        return [(request.method, request.chat.messages[0].content) for request in self.requests]


@pytest.fixture
def gateway() -> Iterator[tuple[str, PausingGateway]]:
    servicer = PausingGateway()
    server = grpc.server(ThreadPoolExecutor(4))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    servicer.may_go_on.set()
    server.stop(None).wait()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", *(f"prompt {n}" for n in range(NUM_PROMPTS)))
    return ["--prompts", str(prompts), "--warmup", "0", "--max-new-tokens", "5"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / REQUESTS_FILE).read_text().splitlines()]


def interrupt_after(num_requests: int, servicer: PausingGateway, address: str, *arguments: str) -> str:
    """Run the command, interrupt it as Ctrl-C does once so many requests were answered; return its words."""
    servicer.num_free = num_requests
    command = [sys.executable, "-m", "specdec", "bench", "run", "--gateway", address, *arguments]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert servicer.is_reached.wait(WAIT_S)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=WAIT_S)
    assert running.returncode == 1
    servicer.num_free = 10**9
    return told


def test_an_interrupted_run_goes_on_where_it_was(
    gateway: tuple[str, PausingGateway], arguments: list[str], tmp_path: Path
) -> None:
    address, servicer = gateway
    out = tmp_path / "out"
    told = interrupt_after(5, servicer, address, "--out", str(out), *arguments)
    assert f"What was measured is in {out}" in told
    assert "--resume" in told
    assert len(lines(out)) == 5
    assert not (out / "results.json").exists()
    before = lines(out)
    # A crash may have cut the last line.
    with (out / REQUESTS_FILE).open("a") as file:
        file.write('{"method": "ngr')
    result = bench_run(address, out, "--resume", *arguments)
    assert result.exit_code == 0, result.output
    assert sorted(servicer.asked) == sorted(
        (method, f"prompt {n}") for method in ("none", "ngram") for n in range(NUM_PROMPTS)
    ), "each was asked once"
    assert lines(out)[:5] == before
    assert len(lines(out)) == 2 * NUM_PROMPTS
    results = json.loads((out / "results.json").read_text())
    counted = sorted((row["method"], row["num_prompts"]) for row in results["rows"])
    assert counted == sorted([("none", 6), ("ngram", 6), *[("none", 3), ("ngram", 3)] * 2])
    assert results["provenance"]["num_requests_before"] == 5
    # Once more: nothing is left.
    assert bench_run(address, out, "--resume", *arguments).exit_code == 0
    assert len(servicer.asked) == 2 * NUM_PROMPTS
    again = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in again["rows"]] == [row["method"] for row in results["rows"]]
    # Without the option a run begins anew.
    assert bench_run(address, out, *arguments).exit_code == 0
    assert len(servicer.asked) == 4 * NUM_PROMPTS


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--max-new-tokens", "6"], "max_new_tokens was 5 and is 6"),
        (["--methods", "none"], r"methods was \['none', 'ngram'\]"),
        (["--limit", "2"], "num_prompts was 6 and is 2"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    changed: list[str],
    says: str,
    gateway: tuple[str, PausingGateway],
    arguments: list[str],
    tmp_path: Path,
) -> None:
    address, servicer = gateway
    out = tmp_path / "out"
    assert bench_run(address, out, *arguments).exit_code == 0
    kept, num_asked = lines(out), len(servicer.asked)
    result = bench_run(address, out, "--resume", *arguments, *changed)
    assert result.exit_code == 2
    assert re.search(says, result.output)
    assert (lines(out), len(servicer.asked)) == (kept, num_asked)


def test_what_cannot_go_on_is_refused(
    gateway: tuple[str, PausingGateway], arguments: list[str], tmp_path: Path
) -> None:
    address, servicer = gateway
    out = tmp_path / "out"
    with_memory = bench_run(address, out, "--resume", "--memory", *arguments)
    assert "have forgotten" in with_memory.output
    assert bench_run(address, out, "--resume", *arguments).exit_code == 0, "there is nothing yet: it begins"
    (out / SETTINGS_FILE).unlink()
    unknown = bench_run(address, out, "--resume", *arguments)
    assert "are not known" in unknown.output
    assert len(servicer.asked) == 2 * NUM_PROMPTS


def test_a_failed_request_is_measured_again(
    gateway: tuple[str, PausingGateway], arguments: list[str], tmp_path: Path
) -> None:
    address, servicer = gateway
    out = tmp_path / "out"
    assert bench_run(address, out, *arguments).exit_code == 0
    told = lines(out)
    told[3]["error"] = "UnavailableError: it was lost"
    (out / REQUESTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in told))
    assert bench_run(address, out, "--resume", *arguments).exit_code == 0
    assert len(servicer.asked) == 2 * NUM_PROMPTS + 1
    assert not any(line["error"] for line in lines(out))


def test_a_record_comes_back_as_it_was() -> None:
    speculation = Speculation(
        "auto",
        3,
        4,
        2,
        acceptance_histogram=(1, 2),
        proposers=(ProposerStats("mtp", 4, 2, 2),),
        methods=(MethodRounds("mtp", 2), MethodRounds("none", 1)),
    )
    answer = Answer((1, 2), 5, 1.5, None, "length", speculation, accepted=(1, 0), text="a b")
    record = RequestRecord("auto", 2, "q1", "chat", 10.0, 9.0, answer, source="x", ask=2, turn=3, pair=7)
    failed = RequestRecord("none", 1, 4, "chat", 10.0, 9.0, None, error="it was lost")
    for each in (record, failed):
        assert RequestRecord.from_json(json.loads(json.dumps(each.to_json()))) == each
