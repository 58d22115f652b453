"""OpenAI's HTTP interface: the answers that gRPC gives, and a clear error for what is not supported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from specdec.client import GenerateOptions, OutputFormat
from specdec.contract.sampling import SamplingParams
from tests.http_front import CHAT, COMPLETIONS, Reply, ask, connected, text_of
from tests.integration.gated_drafter import eventually
from tests.refusals import PROMPT, shared
from tests.systems import System, is_idle, running_system

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "max_tokens": 24, "method": "ngram"}
SAMPLED_OPTIONS = GenerateOptions(
    sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=7), max_new_tokens=24, method="ngram"
)
COLOURS = OutputFormat(json_schema={"enum": ["red", "green"]})
NAMED: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "colours", "strict": True, "schema": COLOURS.json_schema},
}
UP_OR_DOWN = OutputFormat(choices=("up", "down"))
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "method": "ngram"}
GREEDY_OPTIONS = GenerateOptions(max_new_tokens=24, ignore_eos=True, method="ngram")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tiny_llama: Path) -> AsyncIterator[System]:
    async with running_system(
        tiny_llama, "ngram", gateway_options={"http_listen": "127.0.0.1:0", "max_output_tokens": 400}
    ) as system:
        yield system
        await eventually(lambda: is_idle(system))
        assert system.gateway.generations.num_requests == system.gateway.generations.num_waiting == 0


async def post(system: System, path: str, body: object, **headers: str) -> Reply:
    assert system.gateway.http
    return await ask(system.gateway.http.address, path, body, **headers)


async def get(system: System, path: str) -> Reply:
    assert system.gateway.http
    return await ask(system.gateway.http.address, path)


class TestAnswers:
    @shared
    @pytest.mark.parametrize(
        ("fields", "options"),
        [(SAMPLED, SAMPLED_OPTIONS), (GREEDY, GREEDY_OPTIONS)],
        ids=["sampled", "greedy"],
    )
    async def test_a_chat_has_the_text_that_it_has_over_grpc(
        self, system: System, fields: dict[str, Any], options: GenerateOptions
    ) -> None:
        expected = await system.client.generate(TURNS, options)
        reply = await post(system, CHAT, {"messages": TURNS, **fields}, x_request_id="order-66")
        assert (reply.status, reply.headers["x-request-id"]) == (200, "order-66")
        answer = reply.json
        assert answer["object"] == "chat.completion"
        assert answer["id"] == "chatcmpl-order-66"
        assert answer["model"] == expected.model_id
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == {"length": "length", "stop_token": "stop"}[expected.finish_reason]
        assert choice["logprobs"] is None
        usage = answer["usage"]
        assert usage["prompt_tokens"] == expected.usage.input_tokens
        assert usage["completion_tokens"] == expected.usage.output_tokens
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        told = choice["specdec"]
        assert (told["seed"], told["request_id"]) == (expected.seed, "order-66")
        assert told["speculation"]["method"] == "ngram"
        drafted = told["speculation"]["num_draft_tokens"]
        accepted = told["speculation"]["num_accepted_tokens"]
        assert usage["completion_tokens_details"] == {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }

    @shared
    @pytest.mark.parametrize("prompt", ["Tides come and go", PROMPT], ids=["text", "token ids"])
    async def test_a_completion_has_the_text_that_it_has_over_grpc(self, system: System, prompt: Any) -> None:
        options = GenerateOptions(max_new_tokens=24, ignore_eos=True, method="ngram", raw=prompt != PROMPT)
        expected = await system.client.generate(prompt, options)
        answer = (await post(system, COMPLETIONS, {"prompt": prompt, **GREEDY})).json
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == expected.text
        assert answer["usage"]["prompt_tokens"] == expected.usage.input_tokens
        assert answer["choices"][0]["specdec"]["seed"] is None

    @shared
    @pytest.mark.parametrize(
        ("fields", "output_format", "allowed"),
        [
            ({"response_format": NAMED}, COLOURS, {'"red"', '"green"'}),
            ({"structured_outputs": {"json": COLOURS.json_schema}}, COLOURS, {'"red"', '"green"'}),
            ({"structured_outputs": {"choice": ["up", "down"]}}, UP_OR_DOWN, {"up", "down"}),
            ({"structured_outputs": {"regex": "a{3}|b"}}, OutputFormat(regex="a{3}|b"), {"aaa", "b"}),
            ({"response_format": {"type": "json_object"}}, OutputFormat(json_object=True), None),
        ],
        ids=["schema", "another schema", "choice", "regex", "object"],
    )
    async def test_an_answer_has_the_format_that_was_asked_for(
        self, system: System, fields: dict[str, Any], output_format: OutputFormat, allowed: set[str] | None
    ) -> None:
        options = replace(SAMPLED_OPTIONS, output_format=output_format)
        expected = await system.client.generate(TURNS, options)
        answer = (await post(system, CHAT, {"messages": TURNS, **SAMPLED, **fields})).json
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert expected.text.startswith("{") if allowed is None else expected.text in allowed

    @shared
    @pytest.mark.parametrize("has_usage", [True, False])
    async def test_a_streamed_chat_has_the_same_text_and_form(self, system: System, has_usage: bool) -> None:
        body: dict[str, Any] = {"messages": TURNS, **SAMPLED, "stream": True}
        if has_usage:
            body["stream_options"] = {"include_usage": True}
        expected = await system.client.generate(TURNS, SAMPLED_OPTIONS)
        reply = await post(system, CHAT, body)
        assert reply.headers["cache-control"] == "no-cache"
        events = reply.events
        assert text_of(events) == expected.text
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
        if has_usage:
            usage = events.pop()
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == expected.usage.output_tokens
            assert all(event["usage"] is None for event in events)
        else:
            assert not any("usage" in event for event in events)
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons[-1] in ("length", "stop")
        assert set(reasons[:-1]) == {None}
        assert events[-1]["choices"][0]["delta"] == {}
        assert events[-1]["choices"][0]["specdec"]["seed"] == 7

    @shared
    async def test_a_streamed_completion_has_the_same_text(self, system: System) -> None:
        body = {"prompt": PROMPT, **GREEDY}
        expected = (await post(system, COMPLETIONS, body)).json["choices"][0]
        events = (await post(system, COMPLETIONS, body | {"stream": True})).events
        assert text_of(events) == expected["text"]
        assert events[-1]["choices"][0]["finish_reason"] == expected["finish_reason"]

    @shared
    async def test_several_choices_have_seeds_of_their_own(self, system: System) -> None:
        body = {"prompt": PROMPT, **SAMPLED, "ignore_eos": True, "n": 3}
        reply = await post(system, COMPLETIONS, body, x_request_id="three")
        answer = reply.json
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert [choice["specdec"]["seed"] for choice in choices] == [7, 8, 9]
        assert [choice["specdec"]["request_id"] for choice in choices] == ["three-0", "three-1", "three-2"]
        assert reply.headers["x-request-id"] == "three"
        assert len({choice["text"] for choice in choices}) == 3
        for choice in choices:
            alone = (await post(system, COMPLETIONS, body | {"n": 1, "seed": choice["specdec"]["seed"]})).json
            assert alone["choices"][0]["text"] == choice["text"]
        assert answer["usage"]["prompt_tokens"] == len(PROMPT), "the prompt counts once"
        assert answer["usage"]["completion_tokens"] == 3 * 24

        events = (await post(system, COMPLETIONS, body | {"stream": True})).events
        assert [text_of(events, index) for index in range(3)] == [choice["text"] for choice in choices]

    @shared
    async def test_without_a_seed_each_choice_draws_one(self, system: System) -> None:
        body = {"messages": TURNS, "n": 3, "max_tokens": 8}
        replies = [(await post(system, CHAT, body)).json for _ in range(2)]
        seeds = [choice["specdec"]["seed"] for reply in replies for choice in reply["choices"]]
        assert len(set(seeds)) == 6

    @shared
    async def test_several_prompts_have_choices_in_their_order(self, system: System) -> None:
        prompts = [PROMPT, [9, 8, 7]]
        answer = (await post(system, COMPLETIONS, {"prompt": prompts, **GREEDY, "n": 2})).json
        alone = [
            (await post(system, COMPLETIONS, {"prompt": prompt, **GREEDY})).json["choices"][0]["text"]
            for prompt in prompts
        ]
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [alone[0], alone[0], alone[1], alone[1]]
        assert answer["usage"]["prompt_tokens"] == len(PROMPT) + 3

    @shared
    async def test_stops_end_an_answer(self, system: System) -> None:
        whole = await system.client.generate(PROMPT, GREEDY_OPTIONS)
        at = next(i for i in range(3, 24) if whole.tokens[i].text.strip().isascii() and whole.tokens[i].text)
        stop = whole.tokens[at].text
        for stops in (stop, [stop, "never \0 said"]):
            body = {"prompt": PROMPT, **GREEDY, "stop": stops}
            (choice,) = (await post(system, COMPLETIONS, body)).json["choices"]
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == whole.text[: whole.text.index(stop)]
        body = {"prompt": PROMPT, **GREEDY, "stop_token_ids": [whole.token_ids[4]]}
        answer = (await post(system, COMPLETIONS, body)).json
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == whole.token_ids.index(whole.token_ids[4]) + 1

    @shared
    async def test_log_probabilities_are_those_of_grpc(self, system: System) -> None:
        options = GenerateOptions(max_new_tokens=6, ignore_eos=True, num_top_logprobs=2, method="ngram")
        expected = await system.client.generate(TURNS, options)
        fields = {**GREEDY, "max_tokens": 6}
        body = {"messages": TURNS, **fields, "logprobs": True, "top_logprobs": 2}
        (choice,) = (await post(system, CHAT, body)).json["choices"]
        content = choice["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == [token.logprob for token in expected.tokens]
        assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [
            [logprob for _, logprob in token.top_logprobs] for token in expected.tokens
        ]
        for entry in content:
            assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
            assert entry["token"] in [top["token"] for top in entry["top_logprobs"]], "it is greedy"
        events = (await post(system, CHAT, body | {"stream": True})).events
        streamed = [
            entry
            for event in events
            for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == content

        body = {"prompt": PROMPT, **fields, "logprobs": 1}
        (choice,) = (await post(system, COMPLETIONS, body)).json["choices"]
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {6}
        assert all(len(top) == 1 for top in logprobs["top_logprobs"])
        assert logprobs["text_offset"][0] == 0
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])

    @shared
    async def test_both_names_of_the_length_are_taken(self, system: System) -> None:
        for fields in (
            {"max_tokens": 5},
            {"max_completion_tokens": 5},
            {"max_tokens": 9, "max_completion_tokens": 5},
        ):
            body = {"messages": TURNS, "ignore_eos": True, **fields}
            assert (await post(system, CHAT, body)).json["usage"]["completion_tokens"] == 5

    @shared
    async def test_what_nobody_knows_or_what_asks_for_nothing_is_ignored(self, system: System) -> None:
        body = {"messages": TURNS, **SAMPLED}
        plain = (await post(system, CHAT, body)).json["choices"][0]["message"]
        more = {
            "user": "alice",
            "metadata": {"a": "b"},
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "n": None,
            "stop": None,
            "echo": False,
            "add_generation_prompt": True,
            "add_special_tokens": False,
            "documents": [],
            "include_stop_str_in_output": False,
            "my_own_field": [1, 2],
        }
        turns = [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "name": "alice", "content": "Name three rivers."},
        ]
        reply = await post(system, CHAT, body | more | {"messages": turns, "model": "default"})
        assert reply.json["choices"][0]["message"] == plain


CHAT_BODY: dict[str, Any] = {"messages": TURNS, "max_tokens": 4}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost"}}]}]


class TestRefusals:
    @shared
    @pytest.mark.parametrize(
        ("fields", "param", "fragment"),
        [
            ({"tools": [{"type": "function"}]}, "tools", "not supported"),
            ({"tool_choice": "required"}, "tool_choice", "not supported"),
            ({"functions": [{}]}, "functions", "not supported"),
            ({"response_format": {"type": "poem"}}, "response_format", "json_schema"),
            ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "poem"}}}},
                "response_format",
                "poem",
            ),
            ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
            ({"structured_outputs": {"json": {"type": "poem"}}}, "structured_outputs", "poem"),
            ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json is not JSON"),
            ({"structured_outputs": {"choice": [""]}}, "structured_outputs", "choice[0] is"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs", "0 choices;"),
            (
                {"structured_outputs": {"regex": "a", "choice": ["b"]}},
                "structured_outputs",
                "one of json, regex, choice, json_object; set exactly one",
            ),
            ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", ""),
            (
                {"structured_outputs": {"json_object": True, "whitespace_pattern": " "}},
                "structured_outputs",
                "whitespace_pattern",
            ),
            (
                {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
                "structured_outputs",
                "disable_any_whitespace",
            ),
            (
                {"structured_outputs": {"json_object": True, "disable_additional_properties": True}},
                "structured_outputs",
                "disable_additional_properties",
            ),
            ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "not supported"),
            ({"add_generation_prompt": False}, "add_generation_prompt", "not supported"),
            ({"add_special_tokens": True}, "add_special_tokens", "not supported"),
            ({"documents": [{"text": "x"}]}, "documents", "not supported"),
            (
                {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
                "structured_outputs",
                "leave one",
            ),
            ({"guided_regex": "a+"}, "guided_regex", "not supported"),
            ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
            ({"min_tokens": 3}, "min_tokens", "not supported"),
            ({"messages": IMAGE}, "messages", "'text'"),
            ({"messages": []}, "messages", "at least 1"),
            ({"messages": None}, "messages", "valid array"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "Unknown role"),
            ({"messages": [{"role": "user"}]}, "messages", "required"),
            ({"messages": "hi"}, "messages", "valid array"),
            ({"max_tokens": 0}, "max_tokens", "from 1"),
            ({"max_tokens": 401}, "max_tokens", "at most 400"),
            ({"max_tokens": "4"}, "max_tokens", "valid integer"),
            ({"max_tokens": 2**80}, "max_tokens", "from 1"),
            ({"n": 0}, "n", "from 1 to 16"),
            ({"n": 17}, "n", "from 1 to 16"),
            ({"temperature": -1}, "temperature", "0 is greedy"),
            ({"temperature": True}, "temperature", "valid number"),
            ({"top_p": 0}, "top_p", "in (0, 1]"),
            ({"seed": -1}, "seed", "2**64"),
            ({"stop": ["x"] * 17}, "stop", "At most 16"),
            ({"stop": [""]}, "stop", "1 to 256"),
            ({"logit_bias": {"7": 101}}, "logit_bias", "[-100, 100]"),
            ({"logit_bias": {"word": 1}}, "logit_bias", "valid integer"),
            ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias", "4096"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
            ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
            ({"stream": False, "stream_options": {}}, "stream_options", "needs stream"),
            ({"method": "telepathy"}, "method", "offers none"),
            ({"draft_depth": -1}, "draft_depth", "from 0"),
            ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "vocabulary"),
        ],
        ids=lambda value: ascii(value)[:40],
    )
    async def test_a_chat_that_is_wrong(
        self, system: System, fields: dict[str, Any], param: str, fragment: str
    ) -> None:
        for stream in ({}, {"stream": True}):
            reply = await post(system, CHAT, CHAT_BODY | stream | fields)
            assert reply.status == 400, reply.body
            assert reply.error["type"] == "invalid_request_error"
            assert reply.error["param"] == param
            assert fragment in reply.error["message"]
            assert "x-request-id" in reply.headers

    @shared
    @pytest.mark.parametrize(
        ("fields", "param", "fragment"),
        [
            ({"prompt": []}, "prompt", "empty"),
            ({"prompt": ""}, "prompt", "empty"),
            ({"prompt": None}, "prompt", "valid"),
            ({"prompt": ["a", 1]}, "prompt", "valid string"),
            ({"prompt": [10**6]}, "prompt", "vocabulary"),
            ({"prompt": [-1]}, "prompt", "-1"),
            ({"prompt": ["a"] * 9, "n": 2}, "n", "9 prompts"),
            ({"echo": True}, "echo", "not supported"),
            ({"add_special_tokens": False}, "add_special_tokens", "not supported"),
            ({"suffix": "end"}, "suffix", "not supported"),
            ({"best_of": 3}, "best_of", "not supported"),
            ({"logprobs": 21}, "logprobs", "20"),
        ],
        ids=lambda value: ascii(value)[:40],
    )
    async def test_a_completion_that_is_wrong(
        self, system: System, fields: dict[str, Any], param: str, fragment: str
    ) -> None:
        reply = await post(system, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 4} | fields)
        assert reply.status == 400, reply.body
        assert reply.error["param"] == param
        assert fragment in reply.error["message"]

    @shared
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b'{"messages": "\xff"}', b'{"messages": "\\ud800"}', b"[" * 10_000],
    )
    async def test_what_is_not_a_json_object(self, system: System, body: bytes) -> None:
        reply = await post(system, CHAT, body)
        assert reply.status == 400, reply.body
        assert reply.error["code"] == "malformed_body"

    @shared
    async def test_other_types_paths_methods_and_models(self, system: System) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            reply = await post(system, CHAT, CHAT_BODY, content_type=kind)
            assert (reply.status, reply.headers["connection"]) == (415, "close")
            assert "application/json" in reply.error["message"]
        assert (await get(system, "/v1/nothing")).error["type"] == "not_found_error"
        reply = await get(system, CHAT)
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert reply.error["code"] == "method_not_allowed"
        reply = await post(system, CHAT, CHAT_BODY | {"model": "gpt-9"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert "tiny-llama" in reply.error["message"]
        reply = await post(system, CHAT, CHAT_BODY, x_request_id="two words")
        assert (reply.status, reply.error["param"]) == (400, "x-request-id")

    @shared
    async def test_after_all_that_the_connection_answers_on(self, system: System) -> None:
        assert system.gateway.http
        async with connected(system.gateway.http.address) as peer:
            for fields, status in (({"n": 0}, 400), ({}, 200), ({"method": "telepathy"}, 400), ({}, 200)):
                peer.ask(CHAT, CHAT_BODY | fields)
                assert (await peer.reply()).status == status


class TestInformation:
    @shared
    async def test_models(self, system: System) -> None:
        info = await system.client.info()
        assert info.model
        (model,) = (await get(system, "/v1/models")).json["data"]
        assert model["id"] == info.model.model_id == "tiny-llama"
        assert model["max_model_len"] == info.model.max_length
        assert model["specdec"] == {"methods": [*info.methods], "default_method": info.default_method}
        assert (await get(system, "/v1/models/tiny-llama")).json == model
        assert (await get(system, "/v1/models/another/one")).status == 404

    @shared
    async def test_health(self, system: System) -> None:
        assert (await get(system, "/health")).json == {"status": "ok"}
        system.gateway.host.set_serving(False)
        reply = await get(system, "/health")
        assert (reply.status, reply.error["type"]) == (503, "server_error")
        system.gateway.host.set_serving()
        assert (await get(system, "/health")).status == 200


@shared
async def test_curl_gets_a_stream(system: System) -> None:
    assert system.gateway.http
    body = {"messages": TURNS, **SAMPLED, "stream": True}
    command = [
        *("curl", "--silent", "--show-error", "--no-buffer", "--fail"),
        f"http://{system.gateway.http.address}{CHAT}",
        *("--header", "content-type: application/json", "--data", json.dumps(body)),
    ]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    events = Reply(200, {"content-type": "text/event-stream"}, output).events
    assert text_of(events) == (await system.client.generate(TURNS, SAMPLED_OPTIONS)).text
