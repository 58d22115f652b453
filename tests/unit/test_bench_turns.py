"""`specdec bench run` with several turns, prompts that are asked again, and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.bench.experiment import BenchConfig
from specdec.bench.records import Answer, Contender
from specdec.bench.report import turn_markdown
from specdec.bench.run import run, schedule, warm_up
from specdec.bench.stats import compute_rows, compute_turn_rows
from specdec.bench.workload import Prompt, load_prompts
from specdec.client import Message, Speculation
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from tests.unit.test_bench import ScriptedGateway, bench_run, gateway

__all__ = ["gateway"]

TALK = Prompt(1, "a", "one", later_turns=("two", "three"))
SINGLE = Prompt(2, "b", "alone")


class RecordingBackend:
    """Answers by the length of the conversation, faster each time; fails on the text it is told to."""

    def __init__(self, failing_text: str = "") -> None:
        self.asked: list[Prompt] = []
        self._failing_text = failing_text

    async def generate(self, prompt: Prompt) -> Answer:
        self.asked.append(prompt)
        if prompt.text == self._failing_text:
            raise UnavailableError("gone")
        tpot_ms = 100.0 / len(self.asked)
        rounds = Speculation(
            method="x", num_rounds=2, num_draft_tokens=9, num_accepted_tokens=len(self.asked)
        )
        return Answer((1, 2, 3), 5, 10.0, tpot_ms, "length", rounds, text=f"answer {prompt.turn}")


def write_talks(path: Path, *talks: Sequence[str]) -> Path:
    lines = [{"question_id": i, "category": "a", "turns": turns} for i, turns in enumerate(talks)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Turns


def test_lines_keep_all_their_turns(tmp_path: Path) -> None:
    path = write_talks(tmp_path / "talks.jsonl", ["one", "two", "three"], ["alone"])
    assert [(prompt.text, prompt.later_turns) for prompt in load_prompts(path)] == [
        ("one", ("two", "three")),
        ("alone", ()),
    ]


def test_every_turn_must_have_text(tmp_path: Path) -> None:
    path = write_talks(tmp_path / "talks.jsonl", ["one", " "])
    with pytest.raises(InvalidArgumentError, match="turns a list of non-empty strings"):
        load_prompts(path)


def test_the_shipped_prompts_have_two_turns() -> None:
    assert all(len(prompt.later_turns) == 1 for prompt in load_prompts())


def test_a_run_asks_as_many_turns_as_it_is_told(tmp_path: Path) -> None:
    path = write_talks(tmp_path / "talks.jsonl", ["one", "two", "three"], ["alone"])
    config = BenchConfig(prompts_paths=(path,), num_turns=2)
    assert [prompt.later_turns for prompt in config.load_prompts()] == [("two",), ()]
    with pytest.raises(InvalidArgumentError, match="None of the prompts has 4 turns"):
        replace(config, num_turns=4).load_prompts()


@pytest.mark.parametrize("changes", [{"num_turns": 0}, {"num_asks": 0}])
def test_numbers_below_one_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="turns and asks"):
        BenchConfig(**changes).validate()  # type: ignore[arg-type]


def test_peers_are_not_asked_several_turns() -> None:
    with pytest.raises(InvalidArgumentError, match="Peers answer single turns"):
        BenchConfig(peers=("transformers",), num_turns=2).validate()


async def test_a_turn_comes_after_the_conversation_so_far() -> None:
    backend = RecordingBackend()
    records = await run(list(schedule([Contender("x", backend)], [TALK, SINGLE], [1])))
    assert [prompt.text for prompt in backend.asked] == ["one", "two", "three", "alone"]
    assert backend.asked[2].history == (
        Message("user", "one"),
        Message("assistant", "answer 1"),
        Message("user", "two"),
        Message("assistant", "answer 2"),
    )
    assert [(record.question_id, record.ask, record.turn) for record in records] == [
        (1, 1, 1),
        (1, 1, 2),
        (1, 1, 3),
        (2, 1, 1),
    ]


async def test_a_turn_that_fails_ends_its_conversation() -> None:
    progress: list[tuple[int, int]] = []
    blocks = list(schedule([Contender("x", RecordingBackend("two"))], [TALK, SINGLE], [1]))
    records = await run(blocks, on_progress=lambda done, total: progress.append((done, total)))
    assert [(record.turn, record.error) for record in records] == [
        (1, ""),
        (2, "UnavailableError: gone"),
        (1, ""),
    ]
    assert progress == [(3, 4), (4, 4)]


# Asking again, and memory


async def test_all_prompts_are_asked_once_before_any_is_asked_again() -> None:
    backend = RecordingBackend()
    await run(list(schedule([Contender("x", backend)], [TALK, SINGLE], [1], num_asks=2)))
    once = ["one", "two", "three", "alone"]
    assert [prompt.text for prompt in backend.asked] == [*once, *once]


async def salts_of(has_memory: bool, concurrencies: Sequence[int] = (1,)) -> list[str]:
    backend = RecordingBackend()
    contender = Contender("x", backend, has_memory=has_memory)
    await run(list(schedule([contender], [TALK, SINGLE], concurrencies, num_asks=2)))
    await warm_up([contender], [SINGLE])
    return [prompt.cache_salt for prompt in backend.asked]


async def test_without_memory_every_request_stands_alone() -> None:
    salts = await salts_of(has_memory=False)
    assert len(set(salts)) == len(salts) == 9
    assert all(salts)


async def test_with_memory_a_contender_has_one_salt_apart_from_its_warm_up() -> None:
    *salts, warm_up_salt = await salts_of(has_memory=True)
    assert len(set(salts)) == 1
    assert warm_up_salt not in ("", salts[0])


async def test_memory_starts_empty_at_each_concurrency() -> None:
    *salts, _ = await salts_of(has_memory=True, concurrencies=[1, 2])
    assert len(set(salts[:8])) == len(set(salts[8:])) == 1
    assert salts[0] != salts[-1]


async def test_contenders_do_not_share_their_memory() -> None:
    backends = [RecordingBackend(), RecordingBackend()]
    contenders = [Contender(f"x{i}", backend, has_memory=True) for i, backend in enumerate(backends)]
    await run(list(schedule(contenders, [SINGLE], [1])))
    assert backends[0].asked[0].cache_salt != backends[1].asked[0].cache_salt


# Figures


async def test_figures_are_told_by_time_asked_and_turn() -> None:
    contenders = [Contender(name, RecordingBackend()) for name in ("none", "x")]
    records = await run(list(schedule(contenders, [TALK], [1], num_asks=2)))
    rows = compute_turn_rows(records)
    assert [(each.ask, each.turn, each.row.method) for each in rows] == [
        (ask, turn, method) for ask in (1, 2) for turn in (1, 2, 3) for method in ("none", "x")
    ]
    assert [each.row.mean_acceptance_length for each in rows if each.row.method == "x"] == [
        1.5,
        2.0,
        2.5,
        3.0,
        3.5,
        4.0,
    ]
    assert {each.row.num_prompts for each in rows} == {1}
    assert {each.row.identical_to_none for each in rows} == {1.0}
    lines = turn_markdown(rows).splitlines()
    assert lines[0].startswith("| ask | turn | method |")
    assert lines[-1].startswith("| 2 | 3 | x | 1 |")


async def test_answers_are_compared_turn_by_turn_and_time_by_time() -> None:
    contenders = [Contender(name, RecordingBackend()) for name in ("none", "x")]
    records = await run(list(schedule(contenders, [TALK], [1], num_asks=2)))
    wrong = [
        replace(record, answer=replace(record.answer, token_ids=(9,)))
        if record.answer and (record.method, record.ask, record.turn) == ("x", 2, 1)
        else record
        for record in records
    ]
    assert [row.identical_to_none for row in compute_rows(wrong) if row.category == "all"] == [1.0, 5 / 6]


async def test_one_turn_asked_once_has_no_rows_of_turns() -> None:
    records = await run(list(schedule([Contender("x", RecordingBackend())], [SINGLE], [1])))
    assert compute_turn_rows(records) == []


# The command, against a scripted gateway over gRPC


def test_the_command_reports_each_turn_and_time(gateway: tuple[str, ScriptedGateway], tmp_path: Path) -> None:
    address, servicer = gateway
    talks = write_talks(tmp_path / "talks.jsonl", ["one", "two", "three"], ["alone"])
    arguments = ["--prompts", str(talks), "--turns", "2", "--asks", "2", "--memory", "--warmup", "0"]
    result = bench_run(address, tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    assert "By time asked and turn" in result.output
    results = json.loads((tmp_path / "results.json").read_text())
    about = results["provenance"]
    assert (about["num_turns"], about["num_asks"], about["memory"]) == (2, 2, True)
    rows = results["turn_rows"]
    assert [(row["ask"], row["turn"], row["num_prompts"]) for row in rows if row["method"] == "ngram"] == [
        (1, 1, 2),
        (1, 2, 1),
        (2, 1, 2),
        (2, 2, 1),
    ]
    assert {row["method"] for row in rows} == {"none", "ngram", "ngram:memory"}
    assert "| ask | turn | method |" in (tmp_path / "table.md").read_text()
    later = [request.chat.messages for request in servicer.requests if len(request.chat.messages) == 3]
    assert len(later) == 2 * 3
    said = [(message.role, message.content) for message in later[0]]
    assert said == [("user", "one"), ("assistant", "0 1 2 3 4 "), ("user", "two")]
    salts = [request.cache_salt for request in servicer.requests if request.method == "ngram"]
    assert sorted(salts.count(salt) for salt in set(salts)) == [1] * 6 + [6]


def test_more_turns_than_any_prompt_has_are_refused(
    gateway: tuple[str, ScriptedGateway], tmp_path: Path
) -> None:
    result = bench_run(gateway[0], tmp_path, "--turns", "3")
    assert result.exit_code == 2
    assert "None of the prompts has 3 turns" in result.output
