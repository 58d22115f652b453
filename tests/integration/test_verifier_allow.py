"""A drafter calls the verifiers it may call, waits for none for ever, and tells of no other address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.client import GenerateOptions
from specdec.contract.errors import PermissionDeniedError, UnavailableError
from specdec.contract.target_state import TargetStateRef, TargetStateSpec
from tests.raw_streams import draft_stream
from tests.state_probe import StateProbe, all_of, state_reader, state_session
from tests.systems import running_drafter, running_system, running_verifier

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SPEC = all_of("llama")


class Listener:
    """A TCP server that says nothing and counts its connections."""

    def __init__(self) -> None:
        self.address = ""
        self.num_connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Listener]:
    listener = Listener()
    server = await asyncio.start_server(listener.accept, "127.0.0.1", 0)
    listener.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield listener
    finally:
        server.close()
        listener.close()


async def first_round(drafter: str, ref: TargetStateRef) -> list[int]:
    async with draft_stream(drafter) as stream:
        await stream.open("probe", PROMPT)
        return await stream.round([7], len(PROMPT) + 1, target_state=ref.to_proto())


@pytest.mark.parametrize("mode", ["stream", "auto"])
async def test_an_address_that_is_not_allowed_is_not_called(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    probe = StateProbe(SPEC, needs_weights=True)
    here = {"shared_dir": str(tmp_path)}
    async with (
        listening() as listener,
        running_verifier(tiny_llama, **here) as (verifier, _),
        running_drafter(
            "probe", families=probe.families, target_state=mode, verifier_allow=verifier, **here
        ) as (drafter, _),
        state_session(verifier, PROMPT, SPEC) as (_, ref),
    ):
        for uri in (listener.address, f"xds:///{listener.address}", f"unix:{tmp_path}/socket", "10.0.0.1:1"):
            with pytest.raises(PermissionDeniedError, match="--verifier-allow") as raised:
                await first_round(drafter, replace(ref, verifier_uri=uri))
            assert raised.value.reason == "VERIFIER_NOT_ALLOWED"
            assert uri not in raised.value.message
        assert listener.num_connections == 0
        if mode == "auto":
            assert len(await first_round(drafter, ref)) > 0


async def test_what_an_address_answers_is_not_told(tiny_llama: Path, tmp_path: Path) -> None:
    probe = StateProbe(SPEC)
    here = {"shared_dir": str(tmp_path)}
    async with (
        running_verifier(tiny_llama, **here) as (verifier, _),
        running_drafter("probe", families=probe.families, target_state="stream", **here) as (drafter, _),
        state_session(verifier, PROMPT, SPEC) as (_, ref),
    ):
        for uri in ("127.0.0.1:1", f"unix:{tmp_path}/nothing", f"unix:{tiny_llama}/config.json"):
            with pytest.raises(UnavailableError, match="cannot reach the verifier") as raised:
                await first_round(drafter, replace(ref, verifier_uri=uri))
            for detail in ("refused", "No such file", "connect", "errno", uri):
                assert detail not in raised.value.message.replace("cannot reach", "")


async def test_an_answer_without_the_drafts_of_a_drafter_that_may_not_call(
    tiny_llama: Path, tmp_path: Path
) -> None:
    probe = StateProbe(SPEC)
    here = {"shared_dir": str(tmp_path)}
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options=here,
        drafter_options={**here, "target_state": "stream", "verifier_allow": "10.0.0.0/8"},
    ) as system:
        options = GenerateOptions(max_new_tokens=12, ignore_eos=True, method="none")
        plain = await system.client.generate(PROMPT, options)
        answer = await system.client.generate(PROMPT, replace(options, method="probe"))
    assert answer.token_ids == plain.token_ids
    assert answer.speculation.num_draft_tokens == 0
    assert "--verifier-allow" in answer.speculation.fallback_reason


async def test_a_verifier_that_says_nothing_is_not_waited_for(tiny_llama: Path, tmp_path: Path) -> None:
    async with (
        listening() as listener,
        running_verifier(tiny_llama, shared_dir=str(tmp_path), target_state="stream") as (verifier, _),
        state_session(verifier, PROMPT, SPEC) as (_, ref),
        state_reader("auto", tmp_path, timeout_s=0.3) as reader,
        asyncio.timeout(20),
    ):
        session = reader.open(TargetStateSpec(last_hidden_state=True), 64)
        with pytest.raises(UnavailableError) as raised:
            await session.view(replace(ref, verifier_uri=listener.address))
        assert raised.value.reason == "VERIFIER_SILENT"
        with pytest.raises(UnavailableError):
            await reader.weights(listener.address)
        await session.close()
        assert reader.mirrors.num_used == 0
        assert listener.num_connections > 0
