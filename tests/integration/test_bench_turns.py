"""A run of several turns, asked twice, over real services: memory shows where it must, and nowhere else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from specdec.bench.experiment import BenchConfig, Outcome, run_experiment
from tests.systems import running_system
from tests.tiny_chat import save_tiny_chat_model


async def test_memory_shows_from_the_second_time_on_and_changes_no_answer(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    talk = {"question_id": 1, "category": "a", "turns": [" w5 w9 w11 ", " w7 w3 "]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk))
    config = BenchConfig(
        prompts_paths=(tmp_path / "talks.jsonl",),
        num_turns=2,
        num_asks=2,
        memory=True,
        draft_depth=(6,),
        max_new_tokens=40,
    )

    def measure(gateway: str) -> Outcome:
        return run_experiment(config, config.load_prompts(), gateway, tmp_path / "out")

    drafter_options = {"ngram_memory": 10_000, "ngram_min": 2}
    async with running_system(model, "ngram", drafter_options=drafter_options) as system:
        outcome = await asyncio.to_thread(measure, system.address)
    rows = {(each.row.method, each.ask, each.turn): each.row for each in outcome.turn_rows}
    assert all(row.identical_to_none == 1.0 and not row.num_errors for row in rows.values())
    length = {key: row.mean_acceptance_length or 0.0 for key, row in rows.items()}
    for turn in (1, 2):
        assert length["ngram", 2, turn] == length["ngram", 1, turn]
        assert length["ngram:memory", 2, turn] > length["ngram:memory", 1, turn]
    first, second = (
        next(r for r in outcome.records if (r.method, r.ask, r.turn) == ("none", 1, turn)) for turn in (1, 2)
    )
    assert first.answer is not None
    assert second.answer is not None
    assert second.answer.input_tokens >= first.answer.input_tokens + len(first.answer.token_ids)
