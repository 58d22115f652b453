"""Who may call a gateway, and how much: bearer tokens in a file, and authenticators of one's own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import drafter_service.service
import verifier_service.service
from gateway.callers import CallerLimits, TokenFile
from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from specdec.cli.main import main
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from specdec.service.auth import CALLER, Caller, Limits
from specdec.service.exporters import make_telemetry
from specdec.v1 import gateway_pb2
from tests.integration.gated_drafter import Gate, eventually, eventually_offers
from tests.systems import running_drafter, running_gateway, running_verifier

PROMPT = [5, 6, 7]
SHORT = GenerateOptions(method="none", max_new_tokens=3, ignore_eos=True)


def entry(token: str, *, name: str = "someone", more: str = "") -> str:
    """Return the table of a caller."""
    return f'[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n{more}\n'


def write(path: Path, text: str) -> None:
    """Replace a file at once, as a program does that changes a file in use."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Return a file with one token, "open-sesame"."""
    path = tmp_path / "tokens.toml"
    path.write_text(entry("open-sesame"))
    return path


@asynccontextmanager
async def guarded(model: Path, tokens: Path) -> AsyncIterator[tuple[str, Gate]]:
    """Run a gateway that wants a token; yield its address and the gate of its drafter "gated"."""
    gate = Gate()
    options = {"auth_tokens": str(tokens), "default_max_new_tokens": 12}
    async with (
        running_verifier(model) as (verifier, _),
        running_drafter("gated", families=gate.families) as (drafter, _),
        running_gateway(model, verifier=verifier, drafter=drafter, **options) as (gateway, _),
    ):
        try:
            yield gateway, gate
        finally:
            gate.open()


async def test_nothing_but_health_works_without_a_token(tiny_llama: Path, tokens: Path) -> None:
    expired = entry("yesterday", more="expires = 2020-01-01T00:00:00Z")
    write(tokens, entry("open-sesame") + expired)
    async with guarded(tiny_llama, tokens) as (address, _):
        messages = set()
        for token in ("", "wrong", "yesterday", "open-sesame "):
            async with AsyncClient(address, token=token) as client:
                for call in (client.generate(PROMPT, SHORT), client.info()):
                    with pytest.raises(UnauthenticatedError) as caught:
                        await call
                    messages.add((caught.value.message, caught.value.reason))
        assert len(messages) == 1, "what is wrong with a token is not told"

        async with grpc.aio.insecure_channel(address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await listing.read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

        async with AsyncClient(address, token="open-sesame") as client:
            assert len((await client.generate(PROMPT, SHORT)).token_ids) == 3
            assert "none" in (await client.info()).methods


async def test_limits_are_each_callers_own(tiny_llama: Path, tokens: Path) -> None:
    limits = "max_concurrent_requests = 1\nmax_new_tokens = 8\nrequests_per_minute = 4"
    more_than_usual = entry("large", name="large", more="max_new_tokens = 400")
    write(tokens, entry("small", name="small", more=limits) + more_than_usual)
    gated = GenerateOptions(method="gated", max_new_tokens=5, ignore_eos=True, draft_depth=2)
    async with (
        guarded(tiny_llama, tokens) as (address, gate),
        AsyncClient(address, token="small", timeout_s=60) as small,
        AsyncClient(address, token="large", timeout_s=60) as large,
    ):
        await eventually_offers(large, "gated")
        first = asyncio.create_task(small.generate(PROMPT, gated))
        await gate.reached()

        async def knows_that_it_takes_long() -> bool:
            with pytest.raises(ResourceExhaustedError, match="at a time") as busy:
                await small.generate(PROMPT, SHORT)
            assert busy.value.retry_after_s is not None
            assert 1 <= busy.value.retry_after_s <= 60
            return busy.value.retry_after_s > 1

        await eventually(knows_that_it_takes_long)
        assert len((await large.generate(PROMPT, SHORT)).token_ids) == 3
        gate.open()
        assert len((await first).token_ids) == 5

        with pytest.raises(InvalidArgumentError, match="this token may have 8") as long:
            await small.generate(PROMPT, GenerateOptions(max_new_tokens=9))
        assert long.value.field == "max_new_tokens"
        unsaid = GenerateOptions(method="none", ignore_eos=True)
        assert len((await small.generate(PROMPT, unsaid)).token_ids) == 8
        assert len((await large.generate(PROMPT, unsaid)).token_ids) == 12, "the gateway's own default"
        for _ in range(2):
            await small.generate(PROMPT, SHORT)
        with pytest.raises(ResourceExhaustedError, match="a minute") as used_up:
            await small.generate(PROMPT, SHORT)
        assert used_up.value.retry_after_s is not None
        assert 0 < used_up.value.retry_after_s <= 60
        assert len((await large.generate(PROMPT, SHORT)).token_ids) == 3


async def test_who_gave_up_or_failed_may_ask_again(tiny_llama: Path, tokens: Path) -> None:
    write(tokens, entry("one", more="max_concurrent_requests = 1"))
    async with guarded(tiny_llama, tokens) as (address, _), AsyncClient(address, token="one") as client:

        async def is_let_in() -> bool:
            try:
                await client.generate(PROMPT, SHORT)
            except ResourceExhaustedError:
                return False
            return True

        async with client.stream(PROMPT, replace(SHORT, max_new_tokens=400)) as stream:
            await anext(aiter(stream))
            assert not await is_let_in()
        await eventually(is_let_in)
        with pytest.raises(InvalidArgumentError):
            await client.generate([10**6], SHORT)
        assert await is_let_in()


@pytest.mark.parametrize("error", [UnavailableError("lost"), ValueError("defect"), asyncio.CancelledError()])
def test_a_request_is_no_longer_counted_however_it_ended(error: BaseException) -> None:
    limits = CallerLimits(lambda name: 1.0)
    token = CALLER.set(Caller("one", Limits(max_concurrent_requests=1)))
    try:
        for _ in range(2):
            with pytest.raises(type(error)), limits.admitted(None, 256):
                raise error
        assert limits.num_known == 0
        with limits.admitted(None, 256):
            assert limits.num_known == 1
            with pytest.raises(ResourceExhaustedError), limits.admitted(None, 256):
                raise AssertionError("a second request at a time")
        assert limits.num_known == 0
    finally:
        CALLER.reset(token)


def test_callers_that_ask_no_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits = [0.0], CallerLimits(lambda name: 1.0)
    monkeypatch.setattr("gateway.callers.time.monotonic", lambda: now[0])
    config = GatewayConfig(verifier="localhost:1", drafter="", tokenizer="x")
    for number in range(100):
        token = CALLER.set(Caller(f"caller {number}", Limits(requests_per_minute=1)))
        with limits.admitted(gateway_pb2.GenerateRequest(), config):
            pass
        with pytest.raises(ResourceExhaustedError), limits.admitted(gateway_pb2.GenerateRequest(), config):
            raise AssertionError("a second request within the minute")
        CALLER.reset(token)
        now[0] += 10
    assert limits.num_known == 6


async def test_a_changed_file_is_followed_and_a_bad_one_is_not(tiny_llama: Path, tokens: Path) -> None:
    async with guarded(tiny_llama, tokens) as (address, _):
        for text, good, bad in (
            (entry("second"), "second", "open-sesame"),
            ("no toml [[", "second", "open-sesame"),
            ("", None, "second"),
        ):
            write(tokens, text)
            if good:
                async with AsyncClient(address, token=good) as client:
                    await client.info()
            async with AsyncClient(address, token=bad) as client:
                with pytest.raises(UnauthenticatedError):
                    await client.info()


async def test_a_change_is_read_once(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = TokenFile(tokens)
    caplog.set_level("INFO", "gateway.callers")
    for text, token, event in (
        (entry("second"), "second", "tokens changed"),
        ("no toml [[", "second", "a changed token file is not used"),
    ):
        write(tokens, text)
        caplog.clear()
        for _ in range(3):
            await file.authenticate({"authorization": f"Bearer {token}"})
        assert [record.message for record in caplog.records] == [event]


class OnlyTuesdays:
    """Knows callers by a header of its own."""

    async def authenticate(self, metadata: Mapping[str, str | bytes]) -> Caller:
        if metadata.get("x-day") != "tuesday":
            raise UnauthenticatedError("Come back on Tuesday.")
        return Caller("tuesday's child")


async def test_an_authenticator_of_ones_own(tiny_llama: Path) -> None:
    name = f"{__name__}:OnlyTuesdays"
    async with (
        running_verifier(tiny_llama) as (verifier, _),
        running_gateway(tiny_llama, verifier=verifier, authenticator=name) as (address, _),
        AsyncClient(address, token="whatever") as client,
    ):
        with pytest.raises(UnauthenticatedError, match="Come back on Tuesday"):
            await client.info()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[", "cannot be read as TOML"),
        ('[[tokens]]\nname = "a"', "sha256"),
        ('[[tokens]]\nname = "a"\nsha256 = "abc"', "64 hexadecimal digits"),
        (entry("x", more="max_new_tokens = 0"), "from 1 to"),
        (entry("x", more="max_tokens = 5"), "max_tokens is not a field of a token"),
        (entry("x", more="expires = 2030-01-01T00:00:00"), "with its offset"),
        (entry("x", name=""), "name must be some text"),
        ("tokens = 5", "not as"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        TokenFile(path)


@pytest.mark.parametrize(
    "name",
    ["nowhere:At", "specdec.service.auth", "specdec.service.auth:Nothing", "specdec.service.auth:CALLER"],
)
def test_an_authenticator_that_is_none_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--authenticator"):
        GatewayServer(GatewayConfig(authenticator=name), make_telemetry("gateway"))


async def test_the_command_makes_a_token_that_is_taken(tmp_path: Path) -> None:
    made = CliRunner().invoke(main, ["token", "alice"])
    path = tmp_path / "tokens.toml"
    path.write_text(made.stdout)
    secret = made.stderr.split()[-1]
    assert secret not in made.stdout
    caller = await TokenFile(path).authenticate({"authorization": f"Bearer {secret}"})
    assert caller.name == "alice"


@pytest.mark.parametrize("target", ["example.org:50050", "dns:///gateway:50050", "10.0.0.1:50050"])
def test_a_token_is_not_sent_in_plain_text_to_another_host(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_TOKEN", "secret")
    with pytest.raises(InvalidArgumentError, match="plain text"):
        AsyncClient(target)
    AsyncClient("127.0.0.1:50050")
    AsyncClient("unix:/tmp/gateway.sock")


async def test_sessions_carry_a_key_of_their_caller_and_the_salt(
    tiny_llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tokens, entry("of-alice", name="alice") + entry("of-bob", name="bob"))
    opened: list[tuple[str, str]] = []
    for service, name in (
        (verifier_service.service, "_open_request"),
        (drafter_service.service, "_open_draft"),
    ):
        read = getattr(service, name)

        def note(message: Any, read: Any = read) -> Any:
            opened.append((message.caller_key, message.cache_salt))
            return read(message)

        monkeypatch.setattr(service, name, note)
    async with guarded(tiny_llama, tokens) as (gateway, gate):
        gate.open()
        for token, salt in (("of-alice", "a"), ("of-alice", ""), ("of-bob", "a")):
            async with AsyncClient(gateway, token=token) as client:
                await client.generate(PROMPT, replace(SHORT, method="gated", cache_salt=salt))
    alice, alice_again, bob = (set(opened[index : index + 2]) for index in (0, 2, 4))
    assert [{salt for _, salt in pair} for pair in (alice, alice_again, bob)] == [{"a"}, {""}, {"a"}]
    (key,) = {key for pair in (alice, alice_again) for key, _ in pair}
    (other,) = {key for key, _ in bob}
    assert len(key) == 32, "it is set"
    assert key != other
    assert not {"alice", "bob"} & {key, other}


async def test_a_long_salt_is_refused(tiny_llama: Path, tokens: Path) -> None:
    async with (
        guarded(tiny_llama, tokens) as (gateway, _),
        AsyncClient(gateway, token="open-sesame") as client,
    ):
        await client.generate(PROMPT, replace(SHORT, cache_salt="s" * 256))
        with pytest.raises(InvalidArgumentError, match="at most 256") as caught:
            await client.generate(PROMPT, replace(SHORT, cache_salt="s" * 257))
    assert caught.value.field == "cache_salt"
