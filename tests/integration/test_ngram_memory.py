"""Earlier answers speed up the same caller's later requests, over real services, and nobody else's."""

from __future__ import annotations

from pathlib import Path

from specdec.client import GenerateOptions
from tests.systems import running_system


async def test_a_repeated_request_is_drafted_from_the_answer_before(tiny_llama: Path) -> None:
    prompt = [5, 9, 13, 2, 7]

    def options(salt: str) -> GenerateOptions:
        return GenerateOptions(
            method="ngram", max_new_tokens=60, draft_depth=6, draft_nodes=0, ignore_eos=True, cache_salt=salt
        )

    async with running_system(
        tiny_llama, "ngram", drafter_options={"ngram_memory": 10_000, "ngram_min": 2}
    ) as system:
        results = [await system.client.generate(prompt, options(salt)) for salt in ("a", "a", "b")]
    first, again, other = results
    assert first.token_ids == again.token_ids == other.token_ids
    accepted = [result.speculation.num_accepted_tokens for result in results]
    assert accepted[1] > accepted[0] + 20
    assert accepted[2] == accepted[0], "another salt finds nothing"
