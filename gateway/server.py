"""Put a gateway together."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from gateway.callers import make_authenticator
from gateway.config import GatewayConfig
from gateway.generations import Generations
from gateway.metrics import GatewayMetrics
from gateway.replicas.services import VerifierSet, make_drafter_set, make_verifier_set
from gateway.request.backends import Backends
from gateway.request.text import TextCodec
from gateway.service import SERVICE_NAME, GatewayServicer
from specdec.service.auth import Authenticator
from specdec.service.host import ServiceHost
from specdec.service.process import run_service
from specdec.service.telemetry import Telemetry
from specdec.transport.channel import is_local
from specdec.transport.http_extra import require_http_extra
from specdec.transport.server import ConnectionLimits
from specdec.v1 import gateway_pb2_grpc

if TYPE_CHECKING:
    from gateway.http.server import HttpFront

logger = logging.getLogger(__name__)

_WAIT_REPORT_S = 5.0
_READINESS_POLL_S = 0.5
NO_VERIFIER_S = 10.0
"""How long a gateway without a verifier is ready all the same: a verifier that restarts comes back."""


def make_http_front(
    config: GatewayConfig, generations: Generations, authenticator: Authenticator | None
) -> HttpFront | None:
    """Return OpenAI's interface, if the configuration asks for it.

    Raises:
        FailedPreconditionError: the extra that it needs is not installed.
        InvalidArgumentError: the TLS files are not valid.
    """
    if not config.http_listen:
        return None
    require_http_extra()
    from gateway.http.server import HttpFront  # what it needs is an extra

    return HttpFront(config, generations, authenticator)


class GatewayServer:
    """One gateway process's parts, in the order they start."""

    def __init__(self, config: GatewayConfig, telemetry: Telemetry) -> None:
        self._config = config
        self._telemetry = telemetry
        self._following: asyncio.Task[None] | None = None
        self._outgoing_tls = config.outgoing_tls()
        authenticator = make_authenticator(config)
        addresses = [config.listen, *filter(None, [config.http_listen])]
        if authenticator and not config.tls_certificate and not all(map(is_local, addresses)):
            logger.warning("tokens travel in plain text; give --tls-certificate and --tls-private-key")
        self.generations = Generations(config, telemetry)
        servicer = GatewayServicer(self.generations, config.stream_padding)
        register = partial(gateway_pb2_grpc.add_GatewayServiceServicer_to_server, servicer)
        self.http = make_http_front(config, self.generations, authenticator)
        """OpenAI's interface; None: it is not served."""
        self.host = ServiceHost(
            SERVICE_NAME,
            register,
            config.listen,
            tls=config.server_tls,
            authenticator=authenticator,
            health_listen=config.health_listen,
            on_drain=self.generations.drain,
            fronts=[self.http] if self.http else [],
            limits=ConnectionLimits(
                max_message_bytes=config.max_message_bytes,
                idle_s=config.connection_idle_s,
                max_age_s=config.max_connection_age_s,
                # What came before a connection ends has as long as any request.
                age_grace_s=config.max_wait_s + config.failover_wait_s + config.max_request_s,
            ),
        )

    async def load(self) -> None:
        """Load the tokenizer and wait for a verifier, without which no request can be answered."""
        codec = await asyncio.to_thread(TextCodec.load, self._config.tokenizer)
        self.generations.backends = backends = Backends(
            self._config,
            codec,
            make_verifier_set(
                self._config.verifier_uris, codec.vocabulary_fingerprint, tls=self._outgoing_tls
            ),
            make_drafter_set(self._config.drafter_uris, tls=self._outgoing_tls),
            GatewayMetrics(self._telemetry.meter),
        )
        backends.metrics.observe(
            num_requests=lambda: self.generations.num_requests,
            max_requests=self._config.max_requests,
            num_waiting=lambda: self.generations.num_waiting,
            num_ready_replicas=lambda: {
                "verifier": backends.verifiers.num_ready,
                "drafter": backends.drafters.num_ready,
            },
        )
        await self._wait_for_a_verifier(backends.verifiers)
        self._following = asyncio.ensure_future(self._follow(backends.verifiers))
        # Drafters are welcome, but not worth a long wait: their absence only costs speed.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drafter_wait_s if self._config.drafter else 0):
                await self.generations.backends.drafters.wait_until_ready()

    async def _wait_for_a_verifier(self, verifiers: VerifierSet) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_REPORT_S):
                    return await verifiers.wait_until_ready()
            logger.warning("waiting for a verifier", extra={"replicas": verifiers.describe()})

    async def _follow(self, verifiers: VerifierSet) -> None:
        """Be NOT_SERVING while there has been no verifier for a while: another gateway may reach one."""
        is_serving, ready_at = True, time.monotonic()
        while True:
            await asyncio.sleep(_READINESS_POLL_S)
            if verifiers.num_ready:
                ready_at = time.monotonic()
            if is_serving != (time.monotonic() - ready_at < NO_VERIFIER_S):
                is_serving = not is_serving
                extra = {"serving": is_serving, "replicas": verifiers.describe()}
                logger.warning("verifiers came or went", extra=extra)
                self.host.set_serving(is_serving)

    async def close(self) -> None:
        """Stop watching and send what telemetry is buffered."""
        if self._following:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self.generations.backends:
            await self.generations.backends.verifiers.close()
            await self.generations.backends.drafters.close()
        await asyncio.to_thread(self._telemetry.shutdown)

    async def run(self) -> None:
        """Serve until a signal, then drain."""
        await run_service(self.host, load=self.load, close=self.close, grace_s=self._config.drain_grace_s)
