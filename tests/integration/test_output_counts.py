"""Every emitted token is counted once: the first one, a bonus token a round, and the accepted ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from specdec.client import GenerateOptions, Generation
from specdec.contract.sampling import SamplingParams
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import eventually_offers
from tests.systems import running_system
from tests.tiny_models import EOS, byte_tokenizer
from tests.unit.test_stats import points

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
LETTERS = tuple(byte_tokenizer().backend_tokenizer.encode(ascii_lowercase).ids)
"""Tokens of one letter each, so that the text shows where a stop string is."""
PLAIN = GenerateOptions(
    method="none",
    max_new_tokens=24,
    sampling=SamplingParams(temperature=1.5, seed=5, allowed_token_ids=LETTERS),
)


def endings(text: str) -> Iterator[tuple[str, GenerateOptions]]:
    """Yield finish reasons, and requests that end so, at many places of the text."""
    for length in range(1, 12, 3):
        yield "length", replace(PLAIN, max_new_tokens=length)
        yield "stop_token", replace(PLAIN, stop_token_ids=(LETTERS[ascii_lowercase.index(text[length])],))
        yield "stop_string", replace(PLAIN, stop=(text[length : length + 2], "never"))
    yield "stop_string", replace(PLAIN, stop=(text[3:12],))
    letters_and_end = replace(PLAIN.sampling, allowed_token_ids=(*LETTERS, EOS), logit_bias={EOS: 5.0})
    yield "stop_token", replace(PLAIN, sampling=letters_and_end)


def check(answer: Generation, plain: Generation, finish_reason: str) -> None:
    stats = answer.speculation
    assert (answer.finish_reason, answer.text, answer.token_ids) == (
        finish_reason,
        plain.text,
        plain.token_ids,
    )
    assert answer.usage.output_tokens == len(answer.tokens)
    assert answer.usage.output_tokens == 1 + stats.num_rounds + stats.num_accepted_tokens
    assert stats.num_accepted_tokens == sum(token.is_draft for token in answer.tokens)
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_position)
    assert sum(stats.acceptance_histogram) == stats.num_rounds
    assert not answer.tokens[-1].is_draft
    for proposer in stats.proposers:
        assert proposer.num_accepted_tokens <= stats.num_accepted_tokens


async def test_rounds_and_accepted_tokens_add_up_to_the_output_however_it_ends(
    tiny_llama: Path, noisy_llama: Path
) -> None:
    reader = InMemoryMetricReader()
    drafters = ("ngram", f"same=causal-lm:{tiny_llama}", f"noisy=causal-lm:{noisy_llama}")
    telemetry = make_telemetry("test", metric_reader=reader)
    async with running_system(tiny_llama, *drafters, telemetry=telemetry) as system:
        client = system.client
        await eventually_offers(client, "ngram", "same", "noisy")
        text = (await client.generate(PROMPT, PLAIN)).text
        answers = [await client.generate(PROMPT, PLAIN)] * 2
        num_early = 0
        for finish_reason, options in endings(text):
            plain = await client.generate(PROMPT, options)
            check(plain, plain, finish_reason)
            answers.append(plain)
            sizes = product(("ngram", "same", "noisy+ngram"), (1, 8), (0, 15))
            drafted = await asyncio.gather(
                *(
                    client.generate(
                        PROMPT, replace(options, method=method, draft_depth=depth, draft_nodes=nodes)
                    )
                    for method, depth, nodes in sizes
                )
            )
            for answer in drafted:
                check(answer, plain, finish_reason)
            answers += drafted
            num_early += sum(answer.speculation.num_accepted_tokens > 0 for answer in drafted)
    assert num_early > 40

    def counted(name: str) -> int:
        return sum(point.value for point in points(reader, name))

    assert counted("specdec.rounds") == sum(answer.speculation.num_rounds for answer in answers)
    assert counted("specdec.accepted_tokens") == sum(
        answer.speculation.num_accepted_tokens for answer in answers
    )
