"""Who may use the HTTP interface and how much, its certificates, its traces, and what a start refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from specdec.contract.errors import InvalidArgumentError
from specdec.service.auth import Caller
from specdec.service.exporters import make_telemetry
from specdec.transport.http_extra import MODULES
from tests.certificates import Authority, Folder
from tests.http_front import CHAT, COMPLETIONS, Reply, ask
from tests.integration.gated_drafter import eventually, gated_system
from tests.refusals import PROMPT
from tests.systems import is_idle, running_system

REPOSITORY = Path(__file__).resolve().parents[2]
ASKED: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
GATED = {**ASKED, "method": "gated", "draft_depth": 2}
PATHS = ("/v1/models", "/v1/models/tiny-llama", "/v1/nothing", CHAT)


def entry(token: str, more: str = "") -> str:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f'[[tokens]]\nname = "{token}"\nsha256 = "{digest}"\n{more}\n'


def bearing(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class Fails:
    """An authenticator with a defect."""

    async def authenticate(self, metadata: Any) -> Caller:
        raise ValueError("secret")


class TestCallers:
    async def test_nothing_but_health_works_without_a_token(self, tiny_llama: Path, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens.toml"
        tokens.write_text(entry("open-sesame"))
        options = {"http_listen": "127.0.0.1:0", "auth_tokens": str(tokens)}
        async with running_system(tiny_llama, gateway_options=options) as system:
            assert system.gateway.http
            address = system.gateway.http.address
            for headers in ({}, bearing("wrong"), {"authorization": "open-sesame"}):
                replies = [await ask(address, path, **headers) for path in PATHS]
                replies.append(await ask(address, COMPLETIONS, ASKED, **headers))
                for reply in replies:
                    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
                    assert reply.error["type"] == "authentication_error"
            assert (await ask(address, "/health")).status == 200
            assert (await ask(address, "/v1/models", **bearing("open-sesame"))).status == 200
            assert (await ask(address, COMPLETIONS, ASKED, **bearing("open-sesame"))).status == 200

    async def test_limits_count_over_both_ways_in(self, tiny_llama: Path, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens.toml"
        limits = "max_concurrent_requests = 2\nmax_new_tokens = 8\nrequests_per_minute = 7"
        tokens.write_text(entry("small", limits) + entry("large"))
        options = {"http_listen": "127.0.0.1:0", "auth_tokens": str(tokens)}
        async with gated_system(tiny_llama, gateway_options=options) as (system, gate):
            assert system.gateway.http
            address, generations = system.gateway.http.address, system.gateway.generations

            async def post(caller: str, **fields: Any) -> Reply:
                return await ask(address, COMPLETIONS, ASKED | fields, **bearing(caller))

            running = asyncio.ensure_future(ask(address, COMPLETIONS, GATED, **bearing("small")))
            await gate.reached()
            three = await post("small", n=3)
            assert (three.status, three.error["code"]) == (429, "too_many_requests_of_caller")
            assert 1 <= int(three.headers["retry-after"]) <= 60
            await eventually(lambda: generations.num_requests == 1)
            assert (await post("large", n=3)).status == 200
            gate.open()
            assert (await running).status == 200

            too_long = await post("small", max_tokens=9)
            assert (too_long.status, too_long.error["param"]) == (400, "max_tokens")
            answers = [await post("small") for _ in range(6)]
            used_up = answers[-1]
            assert (used_up.status, used_up.error["code"]) == (429, "too_many_requests_a_minute")
            assert 1 <= int(used_up.headers["retry-after"]) <= 60
            assert (await post("large")).status == 200

    async def test_a_defect_of_an_authenticator_tells_nothing(
        self, tiny_llama: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        options = {"http_listen": "127.0.0.1:0", "authenticator": f"{__name__}:Fails"}
        async with running_system(tiny_llama, gateway_options=options) as system:
            assert system.gateway.http
            reply = await ask(system.gateway.http.address, "/v1/models")
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert reply.headers["x-should-retry"] == "false"
        assert b"secret" not in reply.body
        assert "secret" not in caplog.text


class TestTls:
    async def test_certificates_are_checked_and_followed(self, tiny_llama: Path, tmp_path: Path) -> None:
        ours, other = Authority(), Authority("other")
        files = Folder(tmp_path).write(ours.issue(), ours)
        options = {"http_listen": "127.0.0.1:0", **files.options}
        del options["tls_authorities"]  # the other services speak plaintext here
        async with running_system(tiny_llama, gateway_options=options) as system:
            assert system.gateway.http
            address = system.gateway.http.address

            async def status(trusted: Authority, shown: Folder | None) -> int:
                tls = ssl.create_default_context(cadata=trusted.pem.decode())
                if shown:
                    tls.load_cert_chain(shown.path / "cert.pem", shown.path / "key.pem")
                return (await ask(address, COMPLETIONS, ASKED, tls=tls)).status

            assert await status(ours, files) == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await status(other, files)
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await status(ours, None)
            (tmp_path / "stranger").mkdir()
            stranger = Folder(tmp_path / "stranger").write(other.issue(), other)
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await status(ours, stranger)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await ask(address, "/health")

            files.write(other.issue(), ours, other)
            assert await status(other, stranger) == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await status(ours, files)
            (tmp_path / "key.pem").write_text("no key")
            assert await status(other, stranger) == 200, "the last good files are kept"


class TestTraces:
    async def test_a_request_has_a_trace_with_a_link_to_its_caller(self, tiny_llama: Path) -> None:
        spans = InMemorySpanExporter()
        telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(spans))
        trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        options = {"http_listen": "127.0.0.1:0"}
        async with running_system(tiny_llama, telemetry=telemetry, gateway_options=options) as system:
            assert system.gateway.http
            reply = await ask(
                system.gateway.http.address,
                COMPLETIONS,
                ASKED | {"n": 2},
                traceparent=f"00-{trace_id}-{span_id}-01",
                x_request_id="order-66",
            )

            def requests() -> list[Any]:
                return [span for span in spans.get_finished_spans() if span.name == "specdec.generate"]

            await eventually(lambda: len(requests()) == 2)
            told = {choice["specdec"]["trace_id"] for choice in reply.json["choices"]}
            assert told == {f"{span.context.trace_id:032x}" for span in requests()}
            for span in requests():
                (link,) = span.links
                assert (link.context.trace_id, link.context.span_id) == (int(trace_id, 16), int(span_id, 16))
            names = {span.attributes["specdec.request_id"] for span in spans.get_finished_spans()}
            assert names == {"order-66-0", "order-66-1"}
            await eventually(lambda: is_idle(system))


class TestStart:
    def start(self, tmp_path: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> str:
        """Return what a gateway says that does not start."""
        hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
        (tmp_path / "sitecustomize.py").write_text(f"import sys\n{hidden}")
        result = subprocess.run(
            [sys.executable, "-m", "gateway", "--listen", "127.0.0.1:0", *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        output = result.stdout + result.stderr
        assert result.returncode == 2, output
        assert "Traceback" not in output
        return output

    def test_without_the_extra_it_says_what_to_install(self, tmp_path: Path) -> None:
        output = self.start(tmp_path, "--http-listen", "127.0.0.1:0", blocked=MODULES)
        assert 'pip install "specdec[http]"' in json.loads(output.splitlines()[-1])["message"]

    @pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:http", "unix:/run/x"])
    def test_an_address_that_is_none_is_refused(self, address: str, tmp_path: Path) -> None:
        assert "--http-listen is" in self.start(tmp_path, "--http-listen", address)

    async def test_a_port_in_use_is_refused_and_nothing_stays_open(self, tiny_llama: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(InvalidArgumentError, match="--http-listen"):
                async with running_system(tiny_llama, gateway_options={"http_listen": address}):
                    raise AssertionError("it runs")

    async def test_while_it_loads_it_says_so(self) -> None:
        config = GatewayConfig(listen="127.0.0.1:0", http_listen="127.0.0.1:0")
        server = GatewayServer(config, make_telemetry("gateway"))
        await server.host.start()
        assert server.http
        try:
            assert (await ask(server.http.address, "/health")).status == 503
            for reply in (
                await ask(server.http.address, COMPLETIONS, ASKED),
                await ask(server.http.address, "/v1/models"),
            ):
                assert (reply.status, reply.headers["retry-after"]) == (503, "1")
                assert "loading" in reply.error["message"]
        finally:
            await server.host.stop(0)
            await server.close()
