"""Who sees the sizes of an answer's messages does not learn how many tokens its rounds accepted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.padding import pad
from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.v1 import drafter_pb2, gateway_pb2
from tests.hostile.liar import NAME, Liar, running_liar
from tests.integration.gated_drafter import eventually_offers
from tests.refusals import PROMPT
from tests.state_probe import partly_right
from tests.systems import running_gateway, running_verifier
from tests.wire import answer_on_the_wire

PADDING = 512
DEPTH = 4
NUM_TOKENS = 1 + 6 * 6
"""After the first token, both patterns below yield six tokens in two rounds."""
UNEVEN, EVEN = (4, 0), (2, 2)
"""How many tokens of a round's draft are right, in turn."""


class Knows(Liar):
    """Drafts the answer, which it knows, right as far as a pattern says."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern: Sequence[int] = UNEVEN
        self._num_rounds = 0

    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        self._num_rounds = 0
        return await super().open(message)

    def draft(self, message: drafter_pb2.DraftRound) -> drafter_pb2.DraftResult:
        num_right = self.pattern[self._num_rounds % len(self.pattern)]
        self._num_rounds += 1
        expected = self.expected[len(self.committed) :][: message.draft_depth]
        return drafter_pb2.DraftResult(draft_token_ids=partly_right(expected, num_right))


def request(method: str, **fields: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(token_ids=PROMPT),
        method=method,
        draft_depth=None if method == "none" else DEPTH,
        max_new_tokens=NUM_TOKENS,
        ignore_eos=True,
        **fields,
    )


@asynccontextmanager
async def known_answers(model: Path, padding: int) -> AsyncIterator[tuple[str, Knows, Generation]]:
    """Run a gateway that pads and a drafter that knows the answer; yield the gateway's address, the drafter,
    and the answer."""
    drafter = Knows()
    async with (
        running_liar(drafter) as drafter_at,
        running_verifier(model) as (verifier_at, _),
        running_gateway(model, verifier=verifier_at, drafter=drafter_at, stream_padding=padding) as (at, _),
        AsyncClient(at, timeout_s=60) as client,
    ):
        await eventually_offers(client, NAME)
        options = GenerateOptions(method="none", max_new_tokens=NUM_TOKENS, ignore_eos=True)
        answer = await client.generate(PROMPT, options)
        drafter.expected = [*PROMPT, *answer.token_ids]
        yield at, drafter, answer


async def sizes(address: str, drafter: Knows, pattern: Sequence[int]) -> list[int]:
    """Return the sizes of the messages of an answer whose drafts are right by a pattern; empty: no drafts."""
    drafter.pattern = pattern
    messages = await answer_on_the_wire(address, request(NAME if pattern else "none"))
    responses = [gateway_pb2.GenerateResponse.FromString(message) for message in messages]
    chunks = [len(response.chunk.tokens) for response in responses if response.HasField("chunk")]
    assert responses[-1].HasField("finished")
    assert sum(chunks) == NUM_TOKENS
    accepted = responses[-1].finished.speculation.acceptance_histogram
    rounds = [*pattern] * ((NUM_TOKENS - 1) // 6) or [0] * (NUM_TOKENS - 1)
    assert list(accepted) == [rounds.count(number) for number in range(len(accepted))]
    return [len(message) for message in messages]


async def test_sizes_tell_what_a_round_accepted(tiny_llama: Path) -> None:
    async with known_answers(tiny_llama, 0) as (address, drafter, _):
        uneven = await sizes(address, drafter, UNEVEN)
        even = await sizes(address, drafter, EVEN)
        # The messages at both ends aside, rounds of five tokens show.
        assert max(uneven[1:-1]) > max(even[1:-1])
        assert len(set(uneven[1:-1])) > 2


async def test_sizes_tell_nothing_where_they_are_padded(tiny_llama: Path) -> None:
    async with known_answers(tiny_llama, PADDING) as (address, drafter, answer):
        uneven, even, plain = [await sizes(address, drafter, pattern) for pattern in (UNEVEN, EVEN, ())]
        assert set(uneven) | set(even) | set(plain) == {PADDING}
        assert uneven == even
        assert len(plain) == NUM_TOKENS + 2  # the rounds can be counted, with padding or without

        async with AsyncClient(address) as client:
            options = GenerateOptions(
                method=NAME, draft_depth=DEPTH, max_new_tokens=NUM_TOKENS, ignore_eos=True
            )
            padded = await client.generate(PROMPT, options)
        assert (padded.token_ids, padded.text) == (answer.token_ids, answer.text)


async def test_rounds_that_release_nothing_are_told_like_others(tiny_llama: Path) -> None:
    """A token that may begin a stop string is held; that it is must not show as a missing message."""
    async with known_answers(tiny_llama, PADDING) as (address, _, answer):
        start = next(i for i in range(1, NUM_TOKENS) if answer.tokens[i].text)
        stop = answer.tokens[start].text + answer.tokens[start + 1].text + "\0never"
        messages = await answer_on_the_wire(address, request("none", stop_strings=[stop]))
        assert [len(message) for message in messages] == [PADDING] * (NUM_TOKENS + 2)
        chunks = [gateway_pb2.GenerateResponse.FromString(message).chunk for message in messages[1:-1]]
        assert any(not chunk.tokens for chunk in chunks)
        assert [token.token_id for chunk in chunks for token in chunk.tokens] == list(answer.token_ids)


async def test_what_does_not_fit_takes_a_multiple(tiny_llama: Path) -> None:
    async with known_answers(tiny_llama, 64) as (address, _, _):
        messages = await answer_on_the_wire(address, request("none", num_top_logprobs=20))
        assert {len(message) % 64 for message in messages} == {0}
        assert len({len(message) for message in messages}) > 1


@given(st.integers(0, 40_000), st.integers(1, 2**16))
def test_every_size_is_the_next_multiple(size: int, multiple: int) -> None:
    response = gateway_pb2.GenerateResponse(started=gateway_pb2.GenerateStarted(trace_id="x" * size))
    before = response.ByteSize()
    pad(response, multiple)
    assert response.ByteSize() % multiple == 0
    missing = -before % multiple
    # A field takes two bytes at least, so where one byte is missing it is one multiple more.
    assert response.ByteSize() - before == (missing if missing != 1 else multiple + 1)
    assert not b"".join(response.padding).strip(b"\0")
    pad(response, multiple)
    assert response.ByteSize() - before == (missing if missing != 1 else multiple + 1)


@pytest.mark.parametrize("multiple", [1, 2, 3, 64, 128, 130, 1024, 16_387, 65_536])
def test_every_length_can_be_made_up(multiple: int) -> None:
    for size in range(300):
        response = gateway_pb2.GenerateResponse(started=gateway_pb2.GenerateStarted(trace_id="x" * size))
        pad(response, multiple)
        assert response.ByteSize() % multiple == 0


def test_nothing_is_padded_unless_it_is_asked_for() -> None:
    response = gateway_pb2.GenerateResponse(chunk=gateway_pb2.GenerateChunk())
    pad(response, 0)
    assert not response.padding
