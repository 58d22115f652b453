"""Answers in a format: each is of the format, whatever drafts it, and the same as without drafts."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from specdec.client import AsyncClient, GenerateOptions, OutputFormat
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import eventually
from tests.integration.test_failover import PROMPT as PROMPT_OF_FAILOVER
from tests.integration.test_failover import lose_one
from tests.integration.test_lossless import TEST_FAMILIES
from tests.integration.test_preempted_requests import LENGTH, alone, answers, total
from tests.integration.test_preemption import BLOCK_MIB
from tests.raw_streams import verify_stream
from tests.systems import is_idle, running_drafter, running_gateway, running_system, running_verifier
from tests.tiny_models import byte_tokenizer, save_tiny_model

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8, "pattern": "^[a-z]*$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["old", "young", None]}, "minItems": 2, "maxItems": 4},
        "is_tall": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/size"}]},
    },
    "required": ["name", "age", "tags", "is_tall"],
    "additionalProperties": False,
    "$defs": {"size": {"type": "object", "properties": {"cm": {"const": 170}}, "required": ["cm"]}},
}
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}
CITIES = ("Paris", "London", "London Bridge", "Rome")
NO_SPACE: dict[int, float] = {byte_tokenizer()(space)["input_ids"][0]: -100.0 for space in " \t\r\n"}
"""What keeps a random model from filling its answer with whitespace."""
SAMPLINGS = (
    SamplingParams(logit_bias=NO_SPACE),
    SamplingParams(temperature=1.0, seed=3, logit_bias=NO_SPACE),
    SamplingParams(temperature=1.3, top_p=0.9, presence_penalty=0.6, seed=4, logit_bias=NO_SPACE),
)
METHODS: tuple[tuple[str, dict[str, int]], ...] = (
    ("ngram", {"draft_depth": 4}),
    ("wrong", {"draft_depth": 4}),
    ("same", {"draft_depth": 4}),
    ("noisy", {"draft_depth": 4}),
    ("noisy+ngram", {"draft_depth": 4, "draft_nodes": 8}),
    ("same+wrong", {"draft_depth": 4}),
    ("auto", {}),
)


@dataclass(frozen=True)
class Asked:
    """A format, and whether a text is of it."""

    output_format: OutputFormat
    is_right: Callable[[str], bool]


def is_valid(schema: dict[str, Any]) -> Callable[[str], bool]:
    return lambda text: jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


FORMATS = {
    "person": Asked(OutputFormat(json_schema=PERSON), is_valid(PERSON)),
    "numbers": Asked(OutputFormat(json_schema=json.dumps(NUMBERS)), is_valid(NUMBERS)),
    "regex": Asked(
        OutputFormat(regex="([a-c]{2}-){9}[0-9]{3}"),
        lambda text: re.fullmatch("([a-c]{2}-){9}[0-9]{3}", text) is not None,
    ),
    "choices": Asked(OutputFormat(choices=CITIES), CITIES.__contains__),
}


@pytest.mark.parametrize("name", FORMATS)
async def test_every_method_gives_the_same_answer_in_the_format(
    name: str, tiny_llama: Path, noisy_llama: Path
) -> None:
    asked, drafters = FORMATS[name], (f"noisy=causal-lm:{noisy_llama}", f"same=causal-lm:{tiny_llama}")
    async with running_system(tiny_llama, "ngram", "wrong", *drafters, families=TEST_FAMILIES) as system:
        num_accepted = 0
        for sampling in SAMPLINGS:
            options = GenerateOptions(
                method="none", output_format=asked.output_format, sampling=sampling, max_new_tokens=300
            )
            plain = await system.client.generate(PROMPT, options)
            assert plain.finish_reason == "stop_token"
            assert asked.is_right(plain.text), plain.text
            for method, size in METHODS:
                answer = await system.client.generate(PROMPT, replace(options, method=method, **size))
                assert answer.token_ids == plain.token_ids, (method, sampling)
                assert answer.text == plain.text
                assert answer.finish_reason == plain.finish_reason
                num_accepted += answer.speculation.num_accepted_tokens
        assert num_accepted > 0 or name == "choices"
        await eventually(lambda: is_idle(system))


async def test_answers_with_and_without_formats_share_a_pass(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram") as system:
        options = [
            GenerateOptions(method="ngram", draft_depth=4, max_new_tokens=60, output_format=output_format)
            for output_format in (None, *(asked.output_format for asked in FORMATS.values()), None)
        ]
        apart = [await system.client.generate(PROMPT, each) for each in options]
        together = await asyncio.gather(*(system.client.generate(PROMPT, each) for each in options))
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in apart]


async def test_any_json_object_is_one(tiny_llama: Path) -> None:
    brace = byte_tokenizer()("}")["input_ids"][0]
    options = GenerateOptions(
        output_format=OutputFormat(json_object=True), sampling=SamplingParams(logit_bias={brace: 30.0})
    )
    async with running_system(tiny_llama) as system:
        answer = await system.client.generate(PROMPT, options)
        assert isinstance(json.loads(answer.text), dict)
        assert answer.finish_reason == "stop_token"


async def test_an_answer_that_is_cut_says_by_what(tiny_llama: Path) -> None:
    options = GenerateOptions(
        output_format=FORMATS["person"].output_format,
        sampling=SAMPLINGS[0],
        method="ngram",
        draft_depth=4,
        max_new_tokens=300,
    )
    async with running_system(tiny_llama, "ngram") as system:
        whole = await system.client.generate(PROMPT, options)
        short = await system.client.generate(PROMPT, replace(options, max_new_tokens=9))
        assert (short.finish_reason, short.token_ids) == ("length", whole.token_ids[:9])
        stopped = await system.client.generate(PROMPT, replace(options, stop=('"age"',)))
        assert stopped.finish_reason == "stop_string"
        assert stopped.text == whole.text.partition('"age"')[0]
        await eventually(lambda: is_idle(system))


@pytest.mark.parametrize(("method", "sampling"), [("ngram", SAMPLINGS[0]), ("none", SAMPLINGS[1])])
async def test_another_verifier_goes_on_in_the_format(
    method: str, sampling: SamplingParams, tiny_llama: Path
) -> None:
    options = GenerateOptions(
        method=method,
        sampling=sampling,
        max_new_tokens=200,
        output_format=OutputFormat(regex="(([a-c]{2}-){3}[0-9]{3} ?){8,12}"),
    )
    async with (
        running_verifier(tiny_llama) as (first_address, first),
        running_verifier(tiny_llama) as (second_address, second),
        running_drafter("ngram") as (drafter, _),
        running_gateway(
            tiny_llama, verifier=f"{first_address},{second_address}", drafter=drafter, failover_wait_s=20.0
        ) as (gateway, _),
        AsyncClient(gateway, timeout_s=100) as client,
    ):
        plain = await client.generate(PROMPT_OF_FAILOVER, replace(options, method="none"))
        answer = await lose_one(client, options, [first, second], after=30)
        assert answer.num_failovers == 1
        assert (answer.text, answer.token_ids) == (plain.text, plain.token_ids)
        assert re.fullmatch("(([a-c]{2}-){3}[0-9]{3} ?){8,12}", answer.text)


@pytest.mark.parametrize(("method", "sampling"), [("none", SAMPLINGS[1]), ("ngram", SAMPLINGS[0])])
async def test_preempted_answers_go_on_in_the_format(
    method: str, sampling: SamplingParams, tiny_llama: Path
) -> None:
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    options = GenerateOptions(
        method=method,
        sampling=sampling,
        max_new_tokens=LENGTH - 5,
        output_format=OutputFormat(regex=f"([a-f][0-9]){{{LENGTH}}}"),
    )
    expected = await alone(tiny_llama, options)
    async with running_system(
        tiny_llama, "ngram", telemetry=telemetry, verifier_options={"kv_cache_mib": 4 * BLOCK_MIB}
    ) as system:
        found = await answers(system, options)
        assert [answer.token_ids for answer in found] == expected
        assert all(re.match("([a-f][0-9])+", answer.text) for answer in found)
        assert total(reader, "specdec.preemptions") > 0
        await eventually(lambda: is_idle(system))


async def test_a_format_too_complex_to_go_on_in_ends_the_request_alone(tiny_llama: Path) -> None:
    too_complex = GenerateOptions(output_format=OutputFormat(regex=f"xyx(z|{'a?' * 2000})"))
    async with running_system(tiny_llama, "ngram") as system:
        for method in ("none", "ngram"):
            with pytest.raises(InvalidArgumentError, match="too complex") as caught:
                await system.client.generate(PROMPT, replace(too_complex, method=method))
            assert caught.value.reason == "OUTPUT_FORMAT_TOO_COMPLEX"
        await eventually(lambda: is_idle(system))
        options = GenerateOptions(output_format=FORMATS["choices"].output_format)
        assert (await system.client.generate(PROMPT, options)).text in CITIES


async def test_a_beginning_that_is_not_of_the_format_is_refused(tiny_llama: Path) -> None:
    message = FORMATS["choices"].output_format.to_proto()
    begun, other = byte_tokenizer()("Rom")["input_ids"], byte_tokenizer()("Sure: Rom")["input_ids"]
    async with running_verifier(tiny_llama) as (address, server):
        async with verify_stream(address) as stream:
            first = await stream.open([*PROMPT, *begun], prompt_length=len(PROMPT), output_format=message)
            assert first.bonus_token_id == byte_tokenizer()("e")["input_ids"][0]
        async with verify_stream(address) as stream:
            with pytest.raises(InvalidArgumentError, match="does not follow the output format"):
                await stream.open([*PROMPT, *other], prompt_length=len(PROMPT), output_format=message)
        async with verify_stream(address) as stream:  # where all of it is the prompt, the answer is to begin
            first = await stream.open([*PROMPT, *other], output_format=message)
            assert first.bonus_token_id in byte_tokenizer()("PLR")["input_ids"]
        verifier = server.servicer.verifier
        await eventually(lambda: nothing_is_open(verifier))


async def nothing_is_open(verifier: Any) -> bool:
    return bool(verifier.num_sessions == 0)


async def test_a_model_without_a_tokenizer_takes_no_formats(tiny_llama: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_llama, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    async with running_verifier(bare) as (address, _), verify_stream(address) as stream:
        with pytest.raises(FailedPreconditionError, match="has no tokenizer"):
            await stream.open(PROMPT, output_format=FORMATS["choices"].output_format.to_proto())


async def test_a_model_without_an_end_token_takes_no_formats(tmp_path: Path) -> None:
    endless = save_tiny_model(tmp_path / "endless", eos_token_id=None)  # type: ignore[arg-type]
    async with running_system(endless) as system:
        (replica,) = (await system.client.info()).verifiers
        assert not replica.info.takes_output_formats  # type: ignore[union-attr]
        options = GenerateOptions(output_format=FORMATS["choices"].output_format)
        with pytest.raises(FailedPreconditionError, match="no end token"):
            await system.client.generate(PROMPT, options)
        assert (await system.client.generate(PROMPT, max_new_tokens=4)).text is not None
