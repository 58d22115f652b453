"""`specdec bench`: workload, order of a run, figures and files; peers as a part of a run."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from specdec.bench import plots, provenance
from specdec.bench.cli import bench
from specdec.bench.compare import comparison_table, differences
from specdec.bench.experiment import BenchConfig
from specdec.bench.records import Answer, Contender, RequestRecord
from specdec.bench.report import category_table, markdown, pair_table, peer_ratios, read_rows
from specdec.bench.run import run, schedule, warm_up
from specdec.bench.stats import Row, compute_rows
from specdec.bench.workload import DEFAULT_PROMPTS, Prompt, load_prompts, select_round_robin
from specdec.client import Speculation
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc, verifier_pb2
from tests.tiny_chat import greedy, save_tiny_chat_model

# Workload


def test_the_default_workload_has_48_prompts_in_six_categories() -> None:
    prompts = load_prompts()
    assert len(prompts) >= 48
    assert len({prompt.question_id for prompt in prompts}) == len(prompts)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    sizes = Counter(prompt.category for prompt in prompts)
    assert len(sizes) == 6
    assert set(sizes.values()) == {8}


def test_the_default_workload_is_in_the_form_of_spec_bench() -> None:
    for line in DEFAULT_PROMPTS.read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"question_id", "category", "turns"}


def test_passages_to_summarize_have_120_to_250_words() -> None:
    for prompt in load_prompts():
        if prompt.category == "summarization":
            _, passage = prompt.text.split("\n\n", 1)
            assert 120 <= len(passage.split()) <= 250


def test_a_limit_takes_prompts_from_all_categories_in_turn() -> None:
    prompts = [Prompt(i, category, "x") for i, category in enumerate(["a", "a", "a", "b", "c", "c"])]
    assert [prompt.question_id for prompt in select_round_robin(prompts, 4)] == [0, 3, 4, 1]
    assert [prompt.question_id for prompt in select_round_robin(prompts, None)] == [0, 3, 4, 1, 5, 2]
    assert select_round_robin([], 3) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("not json", ":1 is not of the form"),
        ('{"question_id": 1, "category": "a"}', "'turns'"),
        ('{"question_id": 1, "category": "a", "turns": []}', "IndexError"),
        ('{"question_id": "", "category": "a", "turns": ["x"]}', "an integer or a non-empty string"),
        ('{"question_id": 1.5, "category": "a", "turns": ["x"]}', "an integer or a non-empty string"),
        ('{"question_id": true, "category": "a", "turns": ["x"]}', "an integer or a non-empty string"),
        ('{"question_id": null, "category": "a", "turns": ["x"]}', "an integer or a non-empty string"),
        ('{"question_id": ["a"], "category": "a", "turns": ["x"]}', "an integer or a non-empty string"),
        ('{"question_id": 1, "category": "a", "turns": [""]}', "non-empty"),
        ('{"question_id": 1, "category": "a", "turns": "abc"}', ":1: .* turns a list"),
        ('{"question_id": 1, "category": "a", "turns": [" "]}', "non-empty"),
        ('{"question_id": 1, "category": "", "turns": ["x"]}', ":1: .* category a non-empty string"),
        ('{"question_id": 1, "category": "all", "turns": ["x"]}', "overall row"),
        ('{"question_id": 1, "category": "a", "turns": ["x"]}\n' * 2, "question_id 1 twice"),
        ('{"question_id": "q/1", "category": "a", "turns": ["x"]}\n' * 2, "question_id 'q/1' twice"),
    ],
)
def test_a_malformed_workload_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        load_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_that_json_allows_in_a_string_end_no_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.jsonl"
    text = "a\u2028b\u2029c\u0085d"
    line = json.dumps({"question_id": 1, "category": "a", "turns": [text]}, ensure_ascii=False)
    path.write_bytes(f"{line}\r\n".encode(encoding))
    assert [prompt.text for prompt in load_prompts(path)] == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_workload_of_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question_id": 1, "category": "a", "turns": ["é"]}', encoding=encoding)
    with pytest.raises(InvalidArgumentError, match=r"not UTF-8 .*; save it as UTF-8"):
        load_prompts(path)


def test_ids_are_integers_or_strings(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    ids: list[int | str] = ["HumanEval/1", 1, "1", 81]
    path.write_text("\n".join(json.dumps({"question_id": i, "category": "a", "turns": ["x"]}) for i in ids))
    assert [prompt.question_id for prompt in load_prompts(path)] == ids


def test_prompts_of_several_files_may_share_ids(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first = write_prompts(tmp_path / "prompts.jsonl", "one", "two")
    second = write_prompts(tmp_path / "more" / "prompts.jsonl", "three")
    prompts = load_prompts(first, second)
    assert [(prompt.question_id, prompt.text) for prompt in prompts] == [(0, "one"), (1, "two"), (0, "three")]
    assert len({prompt.key for prompt in prompts}) == 3
    with pytest.raises(InvalidArgumentError, match=r"more/prompts\.jsonl is given twice"):
        load_prompts(second, first, second)


def test_a_prompt_may_contain_any_separator(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    text = "one\u2028two\x85three\x1cfour"
    line = json.dumps({"question_id": 1, "category": "a", "turns": [text]}, ensure_ascii=False)
    path.write_text(f"{line}\r\n\r\n", encoding="utf-8", newline="")
    assert [prompt.text for prompt in load_prompts(path)] == [json.loads(line)["turns"][0]] == [text]


# Order of a run


def answer(token_ids: tuple[int, ...] = (1, 2, 3), **changes: object) -> Answer:
    given = {
        "token_ids": token_ids,
        "input_tokens": 5,
        "ttft_ms": 10.0,
        "tpot_ms": 20.0,
        "finish_reason": "length",
        "speculation": None,
    }
    return Answer(**(given | changes))  # type: ignore[arg-type]


class ScriptedBackend:
    """Answers at once, keeps a diary, and fails on the prompts it is told to."""

    def __init__(self, name: str, diary: list[tuple[str, int]], failing_ids: frozenset[int] = frozenset()):
        self._name = name
        self._diary = diary
        self._failing_ids = failing_ids

    async def generate(self, prompt: Prompt) -> Answer:
        self._diary.append((self._name, prompt.question_id))
        if prompt.question_id in self._failing_ids:
            raise UnavailableError("gone")
        return answer()


def contenders(*names: str, diary: list[tuple[str, int]]) -> list[Contender]:
    return [Contender(name, ScriptedBackend(name, diary), is_concurrent=name != "peer") for name in names]


PROMPTS = [Prompt(i, "a" if i % 2 else "b", f"prompt {i}") for i in range(5)]


async def test_methods_take_turns_prompt_by_prompt_in_rotating_order() -> None:
    diary: list[tuple[str, int]] = []
    await run(list(schedule(contenders("none", "x", "peer", diary=diary), PROMPTS[:4], [1])))
    assert diary == [
        *[("none", 0), ("x", 0), ("peer", 0)],
        *[("x", 1), ("peer", 1), ("none", 1)],
        *[("peer", 2), ("none", 2), ("x", 2)],
        *[("none", 3), ("x", 3), ("peer", 3)],
    ]


def test_concurrent_blocks_hold_two_prompts_per_worker_and_leave_peers_out() -> None:
    blocks = list(schedule(contenders("none", "x", "peer", diary=[]), PROMPTS, [2]))
    shape = [(block.contender.method, [prompt.question_id for prompt in block.prompts]) for block in blocks]
    assert shape == [("none", [0, 1, 2, 3]), ("x", [0, 1, 2, 3]), ("x", [4]), ("none", [4])]
    assert {block.concurrency for block in blocks} == {2}


async def test_the_shares_of_a_block_add_up_to_its_wall_time() -> None:
    records = await run(list(schedule(contenders("none", diary=[]), PROMPTS[:4], [2])))
    assert len(records) == 4
    ratios = [record.busy_ms / record.wall_ms for record in records]
    assert ratios == pytest.approx([ratios[0]] * 4)


async def test_progress_and_records_are_reported_block_by_block() -> None:
    progress: list[tuple[int, int]] = []
    reported: list[RequestRecord] = []
    blocks = list(schedule(contenders("none", diary=[]), PROMPTS, [2]))
    records = await run(blocks, reported.extend, lambda done, total: progress.append((done, total)))
    assert progress == [(4, 5), (5, 5)]
    assert reported == records


async def test_a_failed_request_is_recorded_and_the_run_goes_on() -> None:
    failing = Contender("x", ScriptedBackend("x", [], frozenset({1})))
    records = await run(list(schedule([failing], PROMPTS[:3], [1])))
    assert [record.error for record in records] == ["", "UnavailableError: gone", ""]
    assert [record.answer is None for record in records] == [False, True, False]
    await warm_up([failing], PROMPTS[:3])


async def test_a_defect_of_the_benchmark_ends_the_run() -> None:
    class Broken:
        async def generate(self, prompt: Prompt) -> Answer:
            raise TypeError("defect")

    with pytest.raises(ExceptionGroup) as caught:
        await run(list(schedule([Contender("x", Broken())], PROMPTS, [1])))
    assert caught.group_contains(TypeError, match="defect")


def test_none_is_always_run_and_first() -> None:
    assert BenchConfig(methods=("a", "b")).gateway_methods == ("none", "a", "b")
    assert BenchConfig(methods=("a", "none", "a")).gateway_methods == ("none", "a")
    assert BenchConfig(methods=()).gateway_methods == ("none",)


def test_options_of_a_method() -> None:
    config = BenchConfig(draft_depth=(4,), temperature=0.5, seed=7, max_new_tokens=9)
    assert config.options("ngram", 4).draft_depth == 4
    assert config.options("ngram").sampling.seed == 7
    assert config.options("ngram").max_new_tokens == 9
    assert config.options("none").draft_depth is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BenchConfig(temperature=-1.0), "temperature"),
        (BenchConfig(concurrencies=()), "concurrency"),
        (BenchConfig(draft_depth=(4, 0)), "draft-depth"),
        (BenchConfig(concurrencies=(0,)), "concurrency"),
        (BenchConfig(peers=("other",)), "no peer 'other'; there are transformers and openvino"),
        (BenchConfig(peers=("transformers",), concurrencies=(4,)), "add 1"),
        (BenchConfig(methods=("transformers",), peers=("transformers",)), "is a peer"),
        (BenchConfig(methods=("transformers-lookup",), peers=("transformers",)), "is a peer"),
        (BenchConfig(peers=("openvino",), temperature=0.5), "use --temperature 0"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config: BenchConfig, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        config.validate()


# Figures


def stats(
    num_rounds: int, num_accepted: int, drafted: tuple[int, ...], accepted: tuple[int, ...]
) -> Speculation:
    return Speculation(
        method="x",
        num_rounds=num_rounds,
        num_draft_tokens=sum(drafted),
        num_accepted_tokens=num_accepted,
        num_draft_tokens_per_position=drafted,
        num_accepted_tokens_per_position=accepted,
        draft_ms=1.0 * num_rounds,
        verify_ms=30.0 * num_rounds,
        transport_ms=2.0 * num_rounds,
        gateway_ms=0.5 * num_rounds,
    )


def record(method: str, question_id: int, answered: Answer | None, busy_ms: float = 100.0) -> RequestRecord:
    category = "a" if question_id < 2 else "b"
    error = "" if answered else "InternalError: broken"
    return RequestRecord(method, 1, question_id, category, busy_ms, busy_ms, answered, error)


def test_methods_are_compared_block_by_block() -> None:
    """What a machine does in between changes both sides of a pair; the interval is that of the median."""
    ratios = [1.5, 1.1, 1.2, 1.3, 1.4, 0.9, 1.6, 1.25, 1.35]
    records = [
        replace(record(method, 0, answer((1, 2, 3)), busy_ms), pair=pair)
        for pair, ratio in enumerate(ratios)
        for method, busy_ms in (("none", 100.0 * (1 + pair)), ("x", 100.0 * (1 + pair) / ratio))
    ]
    by_method = {row.method: row for row in compute_rows(records) if row.category == "all"}
    found = by_method["x"]
    assert found.num_pairs == 9
    assert found.paired_speedup == pytest.approx(1.3)
    assert found.paired_interval == pytest.approx([1.1, 1.5]), "all but the least and the largest"
    assert by_method["none"].paired_speedup is None
    few = compute_rows(records[:4])[1]
    assert few.paired_interval == pytest.approx([1.1, 1.5])
    Console(file=(printed := io.StringIO()), width=200).print(pair_table([found]))
    assert "1.30x (1.10-1.50)" in printed.getvalue()


def plain(tpot_ms: float, token_ids: tuple[int, ...] = (1, 2, 3)) -> Answer:
    return answer(token_ids, tpot_ms=tpot_ms, speculation=stats(2, 0, (), ()))


RECORDS = [
    record("x", 0, answer((1, 2, 3), tpot_ms=20.0, speculation=stats(1, 2, (1, 1), (1, 1))), 50.0),
    record("x", 1, answer((1, 2, 4), tpot_ms=10.0, speculation=stats(2, 1, (2, 1), (1, 0))), 100.0),
    record("x", 2, None),
    record("none", 0, plain(40.0)),
    record("none", 1, plain(44.0)),
    record("none", 2, plain(60.0)),
    record("peer", 0, answer((1, 2, 3), ttft_ms=12.0, tpot_ms=33.0), 200.0),
    record("peer", 1, answer((9,), tpot_ms=None), 200.0),
]


def row(method: str, category: str = "all") -> Row:
    rows = {(row.method, row.category): row for row in compute_rows(RECORDS)}
    return rows[method, category]


def test_figures_of_a_method() -> None:
    figures = row("x")
    assert (figures.num_prompts, figures.num_errors) == (3, 1)
    assert figures.ttft_ms_p50 == 10.0
    assert figures.tpot_ms_p50 == 15.0
    assert figures.speedup == 44.0 / 15.0
    assert figures.tokens_per_s == 6 / 0.150
    assert figures.mean_acceptance_length == 1 + 3 / 3
    assert figures.acceptance_per_position == [2 / 3, 1 / 2]
    assert figures.identical_to_none == 1 / 2
    assert (figures.draft_ms_p50, figures.verify_ms_p50) == (1.0, 30.0)
    assert (figures.transport_ms_p50, figures.gateway_ms_p50) == (2.0, 0.5)


def test_figures_of_none_and_of_a_category() -> None:
    assert row("none").speedup == 1.0
    assert row("none").mean_acceptance_length == 1.0
    assert row("none").identical_to_none == 1.0
    assert row("none").acceptance_per_position == []
    assert row("none", "a").tpot_ms_p50 == 42.0
    assert row("x", "a").speedup == 42.0 / 15.0


def test_a_category_without_answers_has_no_figures() -> None:
    figures = row("x", "b")
    assert (figures.num_prompts, figures.num_errors) == (1, 1)
    assert figures.tpot_ms_p50 is None
    assert figures.speedup is None
    assert figures.tokens_per_s is None
    assert figures.identical_to_none is None


def test_a_peer_has_no_rounds_and_answers_of_one_token_have_no_tpot() -> None:
    figures = row("peer")
    assert figures.tpot_ms_p50 == 33.0
    assert figures.tokens_per_s == 4 / 0.4
    assert figures.mean_acceptance_length is None
    assert figures.verify_ms_p50 is None
    assert figures.identical_to_none == 1 / 2
    assert peer_ratios(compute_rows(RECORDS), ["peer"]) == ["none / peer tokens/s: 3.00"]


def test_answers_are_compared_with_those_to_the_same_prompt_not_to_the_same_id() -> None:
    texts = {"a.jsonl": (1, 2, 3), "b.jsonl": (4, 5, 6)}
    records = [
        RequestRecord(method, 1, "q", "a", 10.0, 10.0, answer(token_ids), source=source)
        for method in ("none", "x")
        for source, token_ids in texts.items()
    ]
    assert [row.identical_to_none for row in compute_rows(records) if row.category == "all"] == [1.0, 1.0]
    swapped = [
        replace(entry, source={"a.jsonl": "b.jsonl", "b.jsonl": "a.jsonl"}[entry.source])
        if entry.method == "x"
        else entry
        for entry in records
    ]
    assert [row.identical_to_none for row in compute_rows(swapped) if row.category == "all"] == [1.0, 0.0]


def test_rows_are_ordered_and_levels_kept_apart() -> None:
    rows = compute_rows(RECORDS)
    assert [(row.category, row.method) for row in rows[:4]] == [
        ("all", "none"),
        ("all", "x"),
        ("all", "peer"),
        ("a", "none"),
    ]
    at_four = RequestRecord("none", 4, 0, "a", 10.0, 10.0, plain(80.0))
    levels = [
        row for row in compute_rows([*RECORDS, at_four]) if row.category == "all" and row.method == "none"
    ]
    assert [(row.concurrency, row.tpot_ms_p50) for row in levels] == [(1, 44.0), (4, 80.0)]


def test_the_markdown_table_has_every_field_and_row() -> None:
    rows = compute_rows(RECORDS)
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert lines[0].strip("| ").split(" | ") == [field.name for field in fields(Row)]


def test_a_category_of_any_name_stays_in_its_cell() -> None:
    """Columns, rows and markup are what a category's name must not make."""
    record = replace(RECORDS[0], category="a|b\nc [/red]")
    row = next(row for row in markdown(compute_rows([record])).splitlines() if "a\\|b" in row)
    assert r"| a\|b c [/red] |" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(fields(Row)) + 1
    printed = io.StringIO()
    rows = [replace(row, method="ngram") for row in compute_rows([record])]
    Console(file=printed, width=200).print(category_table(rows))
    Console(file=printed, width=200).print(comparison_table(rows, rows))
    assert printed.getvalue().count("c [/red]") == 2


# Provenance


def test_provenance_says_where_figures_come_from() -> None:
    found = provenance.collect()
    assert set(found) == {"commit", "dirty", "versions", "hardware", "command", "started_at"}
    assert {"python", "grpcio", "protobuf"} <= set(found["versions"])
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0
    assert found["hardware"]["cpu"]
    assert found["started_at"].endswith("+00:00")
    assert json.loads(json.dumps(found)) == found


def test_differences_between_two_runs_are_named() -> None:
    old = {"commit": "1", "command": "a", "versions": {"torch": "1", "numpy": "2"}}
    new = {"commit": "2", "command": "b", "versions": {"torch": "1"}}
    assert differences(old, new) == ["commit: 1 -> 2", "versions.numpy: 2 -> None"]


# The command, against a scripted gateway over gRPC


class ScriptedGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """`ngram` answers like `none` in fewer rounds; every prompt with "fail" in it is refused."""

    def __init__(self, model_id: str = "tiny") -> None:
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.model_id = model_id

    def GetInfo(  # noqa: N802
        self, request: gateway_pb2.GatewayServiceGetInfoRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        model = common_pb2.ModelInfo(model_id=self.model_id, dtype="float32", device="cpu", vocab_size=128)
        return gateway_pb2.GatewayServiceGetInfoResponse(
            protocol_version=PROTOCOL_VERSION, model=model, methods=["none", "ngram"], default_method="ngram"
        )

    def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        self.requests.append(request)
        if any("fail" in message.content for message in request.chat.messages):
            context.abort(grpc.StatusCode.INTERNAL, "scripted failure")
        yield gateway_pb2.GenerateResponse(
            started=gateway_pb2.GenerateStarted(input_tokens=4, method=request.method, model_id=self.model_id)
        )
        tokens = [gateway_pb2.Token(token_id=i, text=f"{i} ") for i in range(5)]
        yield gateway_pb2.GenerateResponse(chunk=gateway_pb2.GenerateChunk(tokens=tokens))
        yield gateway_pb2.GenerateResponse(finished=_finished(request.method))


def _finished(method: str) -> gateway_pb2.GenerateFinished:
    plain_stats = gateway_pb2.SpeculationStats(method="none", num_rounds=4, verify_ns=80_000_000)
    ngram_stats = gateway_pb2.SpeculationStats(
        method="ngram",
        num_rounds=2,
        num_draft_tokens=4,
        num_accepted_tokens=2,
        num_draft_tokens_per_position=[2, 2],
        num_accepted_tokens_per_position=[2, 0],
        draft_ns=2_000_000,
        verify_ns=42_000_000,
        transport_ns=3_000_000,
        gateway_ns=1_000_000,
    )
    is_plain = method == "none"
    return gateway_pb2.GenerateFinished(
        finish_reason=verifier_pb2.FINISH_REASON_LENGTH,
        usage=gateway_pb2.Usage(input_tokens=4, output_tokens=5),
        timing=gateway_pb2.GenerateTiming(
            ttft_ns=30_000_000, tpot_ns=20_000_000 if is_plain else 10_000_000, total_ns=110_000_000
        ),
        speculation=plain_stats if is_plain else ngram_stats,
    )


@pytest.fixture
def gateway() -> Iterator[tuple[str, ScriptedGateway]]:
    servicer = ScriptedGateway()
    server = grpc.server(ThreadPoolExecutor(4))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def write_prompts(path: Path, *texts: str) -> Path:
    path.write_text(
        "".join(
            json.dumps({"question_id": i, "category": "ab"[i % 2], "turns": [text]}) + "\n"
            for i, text in enumerate(texts)
        )
    )
    return path


def bench_run(address: str, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(bench, ["run", "--gateway", address, "--out", str(out), *arguments])


def test_a_run_writes_its_files(gateway: tuple[str, ScriptedGateway], tmp_path: Path) -> None:
    address, servicer = gateway
    arguments = ["--limit", "6", "--max-new-tokens", "5", "--draft-depth", "2", "--concurrency", "1,2"]
    result = bench_run(address, tmp_path / "new" / "out", *arguments)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert set(results) == {"provenance", "rows", "turn_rows", "errors"}
    assert results["errors"] == []
    about = results["provenance"]
    assert (about["model"], about["dtype"], about["num_prompts"]) == ("tiny", "float32", 6)
    assert (about["max_new_tokens"], about["temperature"], about["seed"]) == (5, 0.0, 0)
    assert about["prompts"] == "default"
    assert about["prompts_sha256"] == hashlib.sha256(DEFAULT_PROMPTS.read_bytes()).hexdigest()
    rows = [Row(**row) for row in results["rows"]]
    assert len(rows) == 2 * 2 * 7  # methods, concurrencies, six categories and "all"
    ngram = next(row for row in rows if (row.method, row.category) == ("ngram", "all"))
    assert ngram.speedup == 2.0
    assert ngram.mean_acceptance_length == 2.0
    assert ngram.acceptance_per_position == [1.0, 0.0]
    assert (ngram.draft_ms_p50, ngram.verify_ms_p50, ngram.transport_ms_p50) == (1.0, 21.0, 1.5)
    assert ngram.identical_to_none == 1.0
    requests = (tmp_path / "new" / "out" / "requests.jsonl").read_text().splitlines()
    assert len(requests) == 2 * 2 * 6
    assert json.loads(requests[0])["token_ids"] == [0, 1, 2, 3, 4]
    assert (tmp_path / "new" / "out" / "table.md").read_text() == markdown(rows)
    assert "By category" in result.output
    # One warm-up prompt each, and none at K = 2.
    assert len(servicer.requests) == len(requests) + 2
    assert {(r.method, r.draft_depth) for r in servicer.requests} == {("none", 0), ("ngram", 2)}


def test_several_numbers_of_draft_tokens_are_methods_of_their_own(
    gateway: tuple[str, ScriptedGateway], tmp_path: Path
) -> None:
    address, servicer = gateway
    result = bench_run(address, tmp_path, "--limit", "2", "--draft-depth", "2,3,2", "--warmup", "0")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"none", "ngram@2", "ngram@3"}
    asked = [(request.method, request.draft_depth) for request in servicer.requests]
    assert sorted(asked) == [("ngram", 2)] * 2 + [("ngram", 3)] * 2 + [("none", 0)] * 2
    assert (tmp_path / "draft_time.png").exists() == plots.has_matplotlib()


def test_failed_requests_are_counted_and_listed(gateway: tuple[str, ScriptedGateway], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "fine", "fail", "fine too")
    result = bench_run(gateway[0], tmp_path, "--prompts", str(prompts), "--warmup", "0")
    assert result.exit_code == 0, result.output
    assert "ngram: 1 of 3 requests failed; first: InternalError: scripted failure" in result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert [error["question_id"] for error in results["errors"]] == [1, 1]
    overall = [row for row in results["rows"] if row["category"] == "all"]
    assert [(row["num_prompts"], row["num_errors"]) for row in overall] == [(3, 1), (3, 1)]


def test_a_run_over_several_files(gateway: tuple[str, ScriptedGateway], tmp_path: Path) -> None:
    first = write_prompts(tmp_path / "first.jsonl", "fine", "fine too")
    second = write_prompts(tmp_path / "second.jsonl", "fail")
    arguments = ("--prompts", str(first), "--prompts", str(second), "--warmup", "0")
    result = bench_run(gateway[0], tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    about = results["provenance"]
    assert (about["prompts"], about["num_prompts"]) == (f"{first}, {second}", 3)
    both = first.read_bytes() + second.read_bytes()
    assert about["prompts_sha256"] == hashlib.sha256(both).hexdigest()
    assert [(error["source"], error["question_id"]) for error in results["errors"]] == [(str(second), 0)] * 2
    asked = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert Counter((entry["source"], entry["question_id"]) for entry in asked) == {
        (str(first), 0): 2,
        (str(first), 1): 2,
        (str(second), 0): 2,
    }
    overall = [row for row in results["rows"] if row["category"] == "all"]
    assert [row["identical_to_none"] for row in overall] == [1.0, 1.0]


def test_a_run_without_answers_fails(gateway: tuple[str, ScriptedGateway], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "fail", "fail again")
    result = bench_run(gateway[0], tmp_path, "--prompts", str(prompts))
    assert result.exit_code == 1
    assert "All 4 requests failed; the first: InternalError: scripted failure" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--methods", "mystery"], 2, "no method 'mystery'; it has none, ngram"),
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--concurrency", "two"], 2, "not a list of integers"),
        (["--concurrency", "0"], 2, "at least 1"),
        (["--limit", "0"], 2, "--limit"),
        (["--prompts", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--peers", "transformers", "--model", "other"], 1, "would load other"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    gateway: tuple[str, ScriptedGateway], tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    result = bench_run(gateway[0], tmp_path, *arguments)
    assert result.exit_code == exit_code
    assert message in result.output


def test_a_gateway_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    result = bench_run("127.0.0.1:1", tmp_path, "--limit", "1")
    assert result.exit_code == 1
    assert "does not answer" in result.output


def test_two_runs_are_put_side_by_side(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    rows = [asdict(row("x"))]
    old.write_text(json.dumps({"provenance": {"commit": "1"}, "rows": rows}))
    new.write_text(json.dumps({"provenance": {"commit": "2"}, "rows": [{**rows[0], "tokens_per_s": 80.0}]}))
    result = CliRunner().invoke(bench, ["compare", str(old), str(new)])
    assert result.exit_code == 0, result.output
    assert "40.00 -> 80.00 (2.00)" in result.output
    assert "commit: 1 -> 2" in result.output
    assert read_rows(old)[1] == [row("x")]


def test_comparing_with_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    result = CliRunner().invoke(bench, ["compare", str(other), str(other)])
    assert result.exit_code == 2
    assert "is not a results.json" in result.output


@pytest.mark.skipif(not plots.has_matplotlib(), reason="matplotlib is not installed")
def test_plots_are_drawn(tmp_path: Path) -> None:
    drawn = plots.draw(compute_rows(RECORDS), tmp_path)
    assert [path.name for path in drawn] == ["speedup.png", "acceptance.png", "profile.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.skipif(not plots.has_matplotlib(), reason="matplotlib is not installed")
def test_acceptance_is_drawn_by_category_where_there_are_several(tmp_path: Path) -> None:
    drafted = answer((1, 2, 3), speculation=stats(2, 1, (2, 1), (1, 0)))
    records = [record(method, number, drafted) for method in ("x", "y+z") for number in (0, 2)]
    odd = [replace(entry, category="$a_{b$") for entry in records]
    drawn = plots.draw(compute_rows([*records, *odd]), tmp_path)
    assert [path.name for path in drawn] == [
        "acceptance.png",
        "acceptance_by_category.png",
        "profile.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_peers_are_rows_of_the_run_and_all_get_the_same_tokens(
    gateway: tuple[str, ScriptedGateway], tiny_model: Path, tmp_path: Path
) -> None:
    address, servicer = gateway
    servicer.model_id = tiny_model.name
    prompts = write_prompts(tmp_path / "prompts.jsonl", "w5 w9 w11", "w7")
    arguments = ["--peers", "transformers", "--model", str(tiny_model), "--prompts", str(prompts)]
    result = bench_run(address, tmp_path, *arguments, "--max-new-tokens", "24")
    assert result.exit_code == 0, result.output
    assert "none / transformers tokens/s: " in result.output
    assert "none / transformers-lookup tokens/s: " in result.output
    assert {tuple(r.token_ids.token_ids) for r in servicer.requests} == {(5, 9, 11, 127), (7, 127)}
    results = json.loads((tmp_path / "results.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    expected = [greedy(tiny_model, [*ids, 127], 24) for ids in ([5, 9, 11], [7])]
    for name in ("transformers", "transformers-lookup"):
        peer = next(row for row in results["rows"] if row["method"] == name)
        assert (peer["num_prompts"], peer["num_errors"]) == (2, 0)
        assert peer["mean_acceptance_length"] is None
        assert peer["tokens_per_s"] > 0
        assert peer["ttft_ms_p50"] > 0
        assert peer["speedup"] > 0
        # The scripted gateway says something else, which is a figure and not a failure.
        assert peer["identical_to_none"] == 0.0
        own = [entry for entry in answers if entry["method"] == name]
        assert [tuple(entry["token_ids"]) for entry in own] == expected
        assert [entry["input_tokens"] for entry in own] == [4, 2]
        assert {entry["finish_reason"] for entry in own} == {"length"}
        described = results["provenance"]["peers"][name]
        assert (described["precision"], set(described["versions"])) == ("float32", {"torch", "transformers"})


@pytest.mark.slow
def test_the_transformers_peer_samples_as_well(
    gateway: tuple[str, ScriptedGateway], tiny_model: Path, tmp_path: Path
) -> None:
    address, servicer = gateway
    servicer.model_id = tiny_model.name
    arguments = ["--peers", "transformers", "--model", str(tiny_model), "--limit", "1", "--temperature", "1"]
    result = bench_run(address, tmp_path, *arguments, "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "results.json").read_text())["errors"] == []
