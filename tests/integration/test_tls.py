"""TLS and mutual TLS between all services and to clients, with real certificates."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace as with_
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.config import GatewayConfig
from gateway.replicas import replica
from gateway.replicas.services import VerifierSet, make_verifier_set
from specdec.client import AsyncClient, Client, GenerateOptions
from specdec.contract.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    SpecdecError,
    UnavailableError,
)
from specdec.contract.target_state import StateStorage
from specdec.models.files import vocabulary_fingerprint
from specdec.service.exporters import make_telemetry
from specdec.transport.channel import TlsConfig
from specdec.transport.tls import OutgoingTls, PemFiles, PemWatch
from tests.certificates import Authority, Folder, Issued, replace
from tests.raw_streams import draft_stream, verify_stream
from tests.state_probe import StateProbe, all_of
from tests.systems import running_drafter, running_gateway, running_verifier
from verifier_service.config import VerifierConfig
from verifier_service.server import VerifierServer

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
OPTIONS = GenerateOptions(max_new_tokens=16, ignore_eos=True, method="probe", draft_depth=3)
REFUSED = "CERTIFICATE_VERIFY_FAILED"


@pytest.fixture(autouse=True)
def quick_look_at_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "_TLS_CHECK_S", 0.05)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Folder:
    """Write a certificate of `authority`, which is the only one trusted."""
    folder = tmp_path / "files"
    folder.mkdir()
    return Folder(folder).write(authority.issue(), authority)


def client_tls(files: Folder) -> TlsConfig:
    return TlsConfig(files.path / "ca.pem", files.path / "key.pem", files.path / "cert.pem")


def outgoing(folder: Path, authority: Authority, issued: Issued | None) -> OutgoingTls:
    """Return the credentials of a caller that trusts `authority` and shows `issued`."""
    folder.mkdir()
    replace(folder / "ca.pem", authority.pem)
    if issued is None:
        return OutgoingTls(PemFiles(folder / "ca.pem"))
    Folder(folder).write(issued, authority)
    return OutgoingTls(PemFiles(folder / "ca.pem", folder / "key.pem", folder / "cert.pem"))


class SecureSystem:
    """All services over mutual TLS; the drafter reads target state by stream."""

    def __init__(
        self,
        model: Path,
        files: Folder,
        *,
        drafter_options: dict[str, str] | None = None,
        verifier_options: dict[str, str] | None = None,
    ) -> None:
        self.model, self.files = model, files
        self.drafter_options = drafter_options or files.options
        self.verifier_options = verifier_options or files.options
        self.probe = StateProbe(all_of("llama"))
        self.address = ""
        self.addresses: dict[str, str] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> SecureSystem:
        enter, options = self._stack.enter_async_context, self.files.options
        verifier, _ = await enter(running_verifier(self.model, **self.verifier_options))
        drafter, _ = await enter(
            running_drafter(
                "probe", families=self.probe.families, target_state="stream", **self.drafter_options
            )
        )
        self.address, self.gateway = await enter(
            running_gateway(self.model, verifier=verifier, drafter=drafter, drafter_wait_s=60, **options)
        )
        self.addresses = {"verifier": verifier, "drafter": drafter, "gateway": self.address}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def client(self, tls: TlsConfig | None = None) -> AsyncClient:
        return AsyncClient(self.address, tls=tls or client_tls(self.files), timeout_s=60)


async def test_a_generation_with_streamed_state_over_mutual_tls(tiny_llama: Path, files: Folder) -> None:
    async with SecureSystem(tiny_llama, files) as system, system.client() as client:
        plain = await client.generate(PROMPT, with_(OPTIONS, method="none", draft_depth=None))
        async with client.stream(PROMPT, OPTIONS) as stream:
            links = [
                link
                async for _ in stream
                for replica in (await client.info()).drafters
                for link in replica.info.state_links  # type: ignore[union-attr]
            ]
            answer = stream.result
    assert answer.token_ids == plain.token_ids
    assert answer.speculation.num_draft_tokens > 0
    assert {link.storage for link in links} == {StateStorage.STREAM.value}


async def test_a_blocking_client_over_mutual_tls(tiny_llama: Path, files: Folder) -> None:
    async with SecureSystem(tiny_llama, files) as system:
        with Client(system.address, tls=client_tls(files), timeout_s=60) as client:
            assert (await asyncio.to_thread(client.info)).verifiers[0].ready


def first_bytes(address: str, tls: TlsConfig) -> bytes:
    """Return what a server says first over TLS: its HTTP/2 settings, or nothing to a client it refuses."""
    context = ssl.create_default_context(cafile=str(tls.root_certificates))
    context.set_alpn_protocols(["h2"])
    if tls.certificate_chain:
        context.load_cert_chain(str(tls.certificate_chain), str(tls.private_key))
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        # Under TLS 1.3 a client's handshake is over before the server has looked at its certificate.
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        return wrapped.recv(9)


async def test_clients_that_are_refused(
    tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    stranger = Authority("stranger")
    async with SecureSystem(tiny_llama, files) as system:

        async def error_of(tls: TlsConfig | None) -> str:
            async with AsyncClient(system.address, tls=tls, timeout_s=20) as client:
                with pytest.raises(UnavailableError) as caught:
                    await client.info()
            return caught.value.message

        def party(name: str, issued: Issued, trusted: Authority) -> TlsConfig:
            (tmp_path / name).mkdir()
            return client_tls(Folder(tmp_path / name).write(issued, trusted))

        assert REFUSED in await error_of(party("trusts another", authority.issue(), stranger))
        for tls in (
            party("signed by another", stranger.issue(), authority),
            party("expired", authority.issue(days=-1), authority),
            TlsConfig(files.path / "ca.pem"),
        ):
            assert "check that it runs" in await error_of(tls)
            assert await asyncio.to_thread(first_bytes, system.address, tls) == b""
        assert await asyncio.to_thread(first_bytes, system.address, client_tls(files)) != b""
        assert "check that it runs" in await error_of(None)
        async with system.client() as client:
            assert (await client.info()).verifiers[0].ready


async def test_each_service_refuses_callers_without_a_right_certificate(
    tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    def shows(name: str, issued: Issued) -> TlsConfig:
        (tmp_path / name).mkdir()
        return client_tls(Folder(tmp_path / name).write(issued, authority))

    async def status_of(address: str, tls: TlsConfig | None) -> object:
        """Return what the health check answers, or the code it fails with."""
        credentials = tls.credentials() if tls else grpc.local_channel_credentials()
        async with grpc.aio.secure_channel(address, credentials) as channel:
            try:
                check = health_pb2_grpc.HealthStub(channel).Check
                return (await check(health_pb2.HealthCheckRequest(), timeout=20)).status
            except grpc.aio.AioRpcError as error:
                return error.code()

    wrong = {
        "signed by another": shows("signed by another", Authority("stranger").issue()),
        "expired": shows("expired", authority.issue(days=-1)),
        "none": TlsConfig(files.path / "ca.pem"),
        "no TLS": None,
    }
    async with SecureSystem(tiny_llama, files) as system:
        for service, address in system.addresses.items():
            for fault, tls in wrong.items():
                assert await status_of(address, tls) is grpc.StatusCode.UNAVAILABLE, (service, fault)
            served = await status_of(address, client_tls(files))
            assert served == health_pb2.HealthCheckResponse.SERVING, service


async def test_a_drafter_reads_no_state_from_a_verifier_it_does_not_trust(
    tiny_llama: Path, tmp_path: Path, files: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    replace(tmp_path / "others.pem", Authority("stranger").pem)
    suspicious = files.options | {"tls_authorities": str(tmp_path / "others.pem")}
    async with (
        SecureSystem(tiny_llama, files, drafter_options=suspicious) as system,
        system.client() as client,
    ):
        plain = await client.generate(PROMPT, with_(OPTIONS, method="none", draft_depth=None))
        answer = await client.generate(PROMPT, OPTIONS)
    assert answer.token_ids == plain.token_ids
    assert answer.speculation.num_draft_tokens == 0
    # Why an address cannot be reached is for those who run the drafter.
    assert "cannot reach the verifier" in answer.speculation.fallback_reason
    assert REFUSED not in answer.speculation.fallback_reason
    assert any(REFUSED in str(vars(record).get("error")) for record in caplog.records)


async def test_who_is_no_gateway_opens_no_session(
    tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    """A drafter's certificate permits reading target state, not opening the verifier's sessions."""
    files.write(authority.issue("gateway"), authority)
    others = tmp_path / "others"
    others.mkdir()
    drafters = Folder(others).write(authority.issue("drafter"), authority)
    rules = {"tls_session_callers": "other-gateway, gateway"}
    async with SecureSystem(
        tiny_llama, files, drafter_options=drafters.options | rules, verifier_options=files.options | rules
    ) as system:
        async with system.client() as client:
            plain = await client.generate(PROMPT, with_(OPTIONS, method="none", draft_depth=None))
            answer = await client.generate(PROMPT, OPTIONS)
        assert answer.token_ids == plain.token_ids
        assert answer.speculation.num_draft_tokens > 0, "the drafter reads state with its own certificate"
        strange = client_tls(drafters)
        async with verify_stream(system.addresses["verifier"], tls=strange) as verify:
            with pytest.raises(PermissionDeniedError, match="session-callers"):
                await verify.open(PROMPT)
        async with draft_stream(system.addresses["drafter"], tls=strange) as draft:
            with pytest.raises(PermissionDeniedError, match="session-callers"):
                await draft.open("probe", PROMPT)


@pytest.mark.parametrize("fault", ["authority", "expired", "name"])
async def test_a_gateway_says_why_it_refuses_a_verifier(
    fault: str, tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    trusted = Authority("stranger") if fault == "authority" else authority
    if fault == "expired":
        files.write(authority.issue(days=-1), authority)
    tls = outgoing(tmp_path / "caller", trusted, authority.issue())
    tls.server_name = "elsewhere" if fault == "name" else ""
    async with running_verifier(tiny_llama, **files.options) as (address, _):
        verifiers = make_verifier_set([address], "", tls=tls)
        try:
            await until_described(verifiers, lambda text: REFUSED in text or "Hostname" in text)
            with pytest.raises(UnavailableError, match="No VerifierService replica is ready"):
                verifiers.pick()
        finally:
            await verifiers.close()


@pytest.mark.parametrize("named", ["verifiers.example", "others.example"])
async def test_replicas_of_a_name_must_show_a_certificate_of_that_name(
    named: str, tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    """A headless service has such certificates: they carry the name, and none of the addresses."""
    files.write(authority.issue(named, is_local=False), authority)
    tls = outgoing(tmp_path / "caller", authority, authority.issue())
    async with running_verifier(tiny_llama, **files.options) as (address, _):
        port = address.rpartition(":")[2]

        async def resolve(uri: str) -> list[str]:
            return [f"ipv4:127.0.0.1:{port}"]

        name = f"dns:///verifiers.example:{port}"
        verifiers = make_verifier_set([name], vocabulary_fingerprint(tiny_llama), resolve=resolve, tls=tls)
        try:
            if named == "verifiers.example":
                await until_described(verifiers, lambda text: text.endswith("does not suit"))
                assert verifiers.pick().is_ready
            else:
                await until_described(verifiers, lambda text: "Hostname" in text)
        finally:
            await verifiers.close()


async def test_a_verifier_refuses_a_gateway_without_certificate(
    tiny_llama: Path, tmp_path: Path, authority: Authority, files: Folder
) -> None:
    async with running_verifier(tiny_llama, **files.options) as (address, _):
        verifiers = make_verifier_set([address], "", tls=outgoing(tmp_path / "caller", authority, None))
        try:
            await until_described(verifiers, lambda text: "UNAVAILABLE" in text)
        finally:
            await verifiers.close()


async def until_described(verifiers: VerifierSet, is_right: Callable[[str], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_right(verifiers.describe()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_rotation_under_load_fails_no_request(tiny_llama: Path, files: Folder) -> None:
    """Certificates of a new authority replace the old ones in three steps: trust, issue, distrust."""
    old, new = Authority("old"), Authority("new")
    files.write(old.issue(), old)
    async with SecureSystem(tiny_llama, files) as system:
        first = system.client()
        done = asyncio.Event()
        num_answers = 0

        async def ask(reconnects: bool) -> None:
            nonlocal num_answers
            while not done.is_set():
                client = system.client() if reconnects else first
                answer = await client.generate(PROMPT, OPTIONS)
                assert len(answer.token_ids) == OPTIONS.max_new_tokens
                num_answers += 1
                if reconnects:
                    await client.close()

        async with first, asyncio.TaskGroup() as group:
            group.create_task(ask(reconnects=False))
            group.create_task(ask(reconnects=True))
            for issued, trusted in (
                (old.issue(), (old, new)),
                (new.issue(), (old, new)),
                (new.issue(), (new,)),
            ):
                await asyncio.sleep(3)
                before = num_answers
                files.write(issued, *trusted)
                async with asyncio.timeout(60):
                    while num_answers < before + 6:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            done.set()
        stale = TlsConfig(*_party(files.path.parent / "stale", old.issue(), old))
        async with AsyncClient(system.address, tls=stale, timeout_s=20) as client:
            with pytest.raises(UnavailableError, match=REFUSED):
                await client.info()
        assert all(replica.is_ready for replica in system.gateway.generations.backends.verifiers.replicas)


def _party(folder: Path, issued: Issued, trusted: Authority) -> tuple[Path, Path, Path]:
    folder.mkdir()
    Folder(folder).write(issued, trusted)
    return folder / "ca.pem", folder / "key.pem", folder / "cert.pem"


async def test_a_bad_file_keeps_the_last_good_certificate(
    tiny_llama: Path, files: Folder, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls = TlsConfig(*_party(files.path.parent / "client", authority.issue(), authority))
    async with SecureSystem(tiny_llama, files) as system:
        for name, content in (
            ("cert.pem", b"no certificate"),
            ("cert.pem", authority.issue().certificate),
            ("ca.pem", b""),
        ):
            good = (files.path / name).read_bytes()
            caplog.clear()
            with caplog.at_level(logging.WARNING, "specdec.transport.tls"):
                replace(files.path / name, content)
                async with system.client(tls) as client:
                    await client.generate(PROMPT, OPTIONS)
            assert "changed TLS files are not used" in caplog.text
            replace(files.path / name, good)
        (files.path / "key.pem").unlink()
        async with system.client(tls) as client:
            await client.generate(PROMPT, OPTIONS)


def test_a_changed_pair_is_taken_as_one(files: Folder, authority: Authority) -> None:
    watch = PemWatch(PemFiles(None, files.path / "key.pem", files.path / "cert.pem"))
    first, second = watch.latest(), authority.issue()
    assert watch.latest() is first
    replace(files.path / "key.pem", second.private_key)
    assert watch.latest() is first
    replace(files.path / "cert.pem", second.certificate)
    assert watch.latest() == with_(first, private_key=second.private_key, certificate=second.certificate)


BAD_FILES = {
    "missing": ("tls_certificate", None, "No such file"),
    "no certificate": ("tls_certificate", b"text", "not a PEM certificate and its plain private key"),
    "another key": ("tls_private_key", Authority().issue().private_key, "KEY_VALUES_MISMATCH|mismatch"),
    "no authorities": ("tls_client_authorities", b"", "does not hold PEM certificate authorities"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_service_does_not_start_with_bad_files(fault: str, files: Folder) -> None:
    option, content, message = BAD_FILES[fault]
    path = Path(files.options[option])
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        VerifierServer(VerifierConfig(**files.options), make_telemetry("verifier"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls_certificate": "cert.pem"}, "go together"),
        ({"tls_private_key": "key.pem"}, "go together"),
        ({"tls_client_authorities": "ca.pem"}, "needs a port with TLS"),
        ({"tls_server_name": "name"}, "needs calls over TLS"),
    ],
)
def test_options_that_lack_another(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        GatewayConfig(**options)


def test_a_client_says_what_is_wrong_with_its_files(files: Folder) -> None:
    missing = files.path / "nowhere.pem"
    for tls in (
        TlsConfig(missing),
        TlsConfig(None, files.path / "key.pem"),
        TlsConfig(None, missing, missing),
    ):
        with pytest.raises(SpecdecError) as caught:
            Client("127.0.0.1:1", tls=tls)
        assert isinstance(caught.value, InvalidArgumentError)
