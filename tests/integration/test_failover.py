"""A verifier that is lost in mid-generation: the client sees a pause, and the text it would have seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gateway.server import GatewayServer
from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.contract.errors import InternalError, UnavailableError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import TargetStateSpec
from tests.integration.gated_drafter import eventually_offers
from tests.raw_streams import until
from tests.slow import quick_only
from tests.state_probe import StateProbe
from tests.systems import running_drafter, running_gateway, running_verifier
from tests.tiny_models import save_tiny_model
from verifier_service.server import VerifierServer

PROMPT = [5, 6, 7, 5, 6, 7, 5]
LONG = GenerateOptions(max_new_tokens=250, ignore_eos=True, draft_depth=3)
GREEDY = SamplingParams()
PENALISED = SamplingParams(
    temperature=0.9, presence_penalty=0.7, frequency_penalty=0.5, repetition_penalty=1.2, seed=11
)


def num_sessions(server: VerifierServer) -> int:
    verifier = server.servicer.verifier
    assert verifier is not None
    return verifier.num_sessions


async def lose_one(
    client: AsyncClient, options: GenerateOptions, servers: Sequence[VerifierServer], after: int
) -> Generation:
    """Return an answer whose verifier is stopped after some tokens."""
    received = []
    async with client.stream(PROMPT, options) as stream:
        async for token in stream:
            received.append(token.token_id)
            after -= 1
            if after == 0:
                (busy,) = [server for server in servers if num_sessions(server)]
                await busy.host.stop(0)
            if after == -20:
                counts = [replica.num_sessions for replica in (await client.info()).verifiers]
                assert sum(counts) == 1, (
                    "the session counts on the verifier where it goes on, and on no other"
                )
        assert tuple(received) == stream.result.token_ids, "every token came once and in order"
        return stream.result


@pytest.mark.parametrize(
    ("method", "sampling"),
    quick_only(
        product(["none", "ngram", "noisy", "probe", "probe+noisy"], [GREEDY, PENALISED]),
        [("none", PENALISED), ("noisy", GREEDY), ("probe+noisy", PENALISED)],
    ),
)
async def test_another_verifier_goes_on_with_the_same_text(
    method: str, sampling: SamplingParams, tiny_llama: Path, noisy_llama: Path
) -> None:
    probe = StateProbe(TargetStateSpec((0, 1), True))
    options = replace(LONG, method=method, sampling=sampling)
    async with (
        running_verifier(tiny_llama) as (first_address, first),
        running_verifier(tiny_llama) as (second_address, second),
        running_drafter("ngram", f"noisy=causal-lm:{noisy_llama}", "probe", families=probe.families) as (
            drafter,
            drafter_server,
        ),
        running_gateway(
            tiny_llama, verifier=f"{first_address},{second_address}", drafter=drafter, failover_wait_s=20.0
        ) as (
            gateway,
            _,
        ),
        AsyncClient(gateway, timeout_s=100) as client,
    ):
        await eventually_offers(client, "ngram", "noisy", "probe")
        expected = await client.generate(PROMPT, replace(options, method="none"))
        answer = await lose_one(client, options, (first, second), after=60)
        assert answer.token_ids == expected.token_ids
        assert (answer.text, answer.finish_reason) == (expected.text, "length")
        assert (expected.num_failovers, answer.num_failovers) == (0, 1)
        assert answer.speculation.num_fallback_rounds < 5
        if "noisy" in method:
            assert answer.speculation.num_draft_tokens > answer.speculation.num_rounds
        if "probe" in method:
            # Before and after: the drafter reads the next verifier's state as it did the lost one's.
            before, after = probe.sessions
            assert len(before.readings) > 5
            assert len(after.readings) > 20
        host = drafter_server.servicer.host
        assert host is not None
        await until(lambda: not num_sessions(first) and not num_sessions(second) and not host.num_sessions)


async def test_what_rounds_cost_is_learned_for_the_verifier_that_ran_them(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (first_address, first),
        running_verifier(tiny_llama) as (second_address, second),
        running_drafter("ngram") as (drafter, _),
        running_gateway(
            tiny_llama, verifier=f"{first_address},{second_address}", drafter=drafter, failover_wait_s=20.0
        ) as (address, gateway),
        AsyncClient(address, timeout_s=100) as client,
    ):
        await eventually_offers(client, "ngram")
        chosen = replace(LONG, method="auto", draft_depth=None)
        answer = await lose_one(client, chosen, (first, second), after=60)
        assert gateway.generations.backends
        controller = gateway.generations.backends.controller
        loads = [
            controller._loads[replica][True] for replica in gateway.generations.backends.verifiers.replicas
        ]
        num_rounds = [load.pace.count for load in loads]
        assert min(num_rounds) > 5
        # The rounds of either but the two openings, and what is not dealt with when the answer ends.
        assert answer.speculation.num_rounds - 3 <= sum(num_rounds) <= answer.speculation.num_rounds
        assert not any(load.sessions for load in loads)


async def test_the_same_verifier_goes_on_once_it_is_back(tiny_llama: Path) -> None:
    options = replace(LONG, method="none")
    async with (
        running_verifier(tiny_llama) as (address, server),
        running_gateway(tiny_llama, verifier=address, failover_wait_s=30.0) as (gateway, _),
        AsyncClient(gateway, timeout_s=100) as client,
    ):
        expected = await client.generate(PROMPT, options)
        lost = asyncio.create_task(lose_one(client, options, (server,), after=60))
        await until(lambda: num_sessions(server) == 1)
        await until(lambda: num_sessions(server) == 0)
        async with running_verifier(tiny_llama, listen=address):
            answer = await lost
    assert answer.token_ids == expected.token_ids
    assert answer.num_failovers == 1


async def test_nobody_to_go_on_with_is_unavailable(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (address, server),
        running_gateway(tiny_llama, verifier=address, failover_wait_s=1.0) as (gateway, _),
        AsyncClient(gateway, timeout_s=100) as client,
    ):
        with pytest.raises(UnavailableError, match="was lost") as raised:
            await lose_one(client, replace(LONG, method="none"), (server,), after=20)
        assert raised.value.reason == "PEER_LOST"


@pytest.mark.parametrize("name", ["another-model", "tiny-llama"], ids=["name", "revision"])
async def test_a_verifier_of_another_model_does_not_go_on(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Two models of one name are two revisions."""
    other = save_tiny_model(tmp_path / name, seed=1)
    assert tiny_llama.name == "tiny-llama"
    async with (
        running_verifier(tiny_llama) as (first_address, first),
        running_verifier(other) as (second_address, second),
        running_gateway(tiny_llama, verifier=f"{first_address},{second_address}", failover_wait_s=1.0) as (
            gateway,
            _,
        ),
        AsyncClient(gateway, timeout_s=100) as client,
    ):
        with pytest.raises(UnavailableError, match="was lost"):
            await lose_one(client, replace(LONG, method="none"), (first, second), after=20)


class Broken:
    """Makes a verifier's passes fail after some of them: an engine's defect, while health says SERVING."""

    def __init__(self, server: VerifierServer, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
        verifier = server.servicer.verifier
        assert verifier is not None
        self.num_asked = 0
        for name in ("prefill", "verify"):
            monkeypatch.setattr(verifier, name, partial(self._pass, getattr(verifier, name)))
        self._left = after

    async def _pass(self, right: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        self.num_asked += 1
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("a defect")
        return await right(*arguments)


@asynccontextmanager
async def two_verifiers(
    model: Path, **first_options: Any
) -> AsyncIterator[tuple[AsyncClient, VerifierServer, VerifierServer, GatewayServer]]:
    async with (
        running_verifier(model, **first_options) as (first_address, first),
        running_verifier(model) as (second_address, second),
        running_gateway(model, verifier=f"{first_address},{second_address}") as (address, gateway),
        AsyncClient(address, timeout_s=60) as client,
    ):
        backends = gateway.generations.backends
        assert backends is not None
        await until(lambda: backends.verifiers.num_ready == 2)
        yield client, first, second, gateway


SHORT = GenerateOptions(max_new_tokens=12, ignore_eos=True, method="none")


async def test_a_broken_replica_takes_no_request_with_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_verifiers(tiny_llama) as (client, first, second, _):
        expected = (await client.generate(PROMPT, SHORT)).token_ids
        broken = Broken(first, monkeypatch)
        answers = [await client.generate(PROMPT, SHORT) for _ in range(30)]
        assert {answer.token_ids for answer in answers} == {expected}
        assert 1 <= sum(answer.num_failovers for answer in answers) == broken.num_asked < 8, "it is let rest"
        assert num_sessions(first) == num_sessions(second) == 0
        assert "replica left alone: it answers with errors" in caplog.messages


async def test_an_answer_goes_on_elsewhere_when_its_replica_breaks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SHORT, max_new_tokens=60, sampling=PENALISED)
    async with two_verifiers(tiny_llama) as (client, first, second, _):
        expected = (await client.generate(PROMPT, options)).token_ids
        for server in (first, second):
            with monkeypatch.context() as patch:
                Broken(server, patch, after=7)
                answers = [await client.generate(PROMPT, options) for _ in range(2)]
            assert {answer.token_ids for answer in answers} == {expected}
        assert num_sessions(first) == num_sessions(second) == 0


async def test_where_every_replica_breaks_the_first_error_is_told_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_verifiers(tiny_llama) as (client, first, second, _):
        broken = [Broken(server, monkeypatch) for server in (first, second)]
        for number in range(1, 5):
            with pytest.raises(InternalError, match="a defect"):
                await client.generate(PROMPT, SHORT)
            assert [each.num_asked for each in broken] == [number, number], "each is tried once a request"
        monkeypatch.undo()
        assert len((await client.generate(PROMPT, SHORT)).token_ids) == 12, "it is asked if all rest"


async def test_a_full_replica_sends_nobody_away_while_another_has_room(tiny_llama: Path) -> None:
    async with two_verifiers(tiny_llama, max_sessions=1) as (client, first, second, _):
        expected = (await client.generate(PROMPT, SHORT)).token_ids
        answers = await asyncio.gather(*(client.generate(PROMPT, SHORT) for _ in range(8)))
        assert {answer.token_ids for answer in answers} == {expected}
        assert num_sessions(first) == num_sessions(second) == 0
