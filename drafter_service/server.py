"""Puts the parts of a drafter service together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from drafter_service.config import DrafterConfig
from drafter_service.families import FAMILIES, DrafterFactory, load_drafters
from drafter_service.host import DrafterHost
from drafter_service.service import SERVICE_NAME, DrafterServicer
from specdec.runtime.model_thread import ModelThread
from specdec.service.host import ServiceHost
from specdec.service.interceptors import OpenCalls
from specdec.service.process import run_service
from specdec.service.sessions import SessionRules
from specdec.service.telemetry import Telemetry
from specdec.service.watchdog import Watchdog
from specdec.transport.server import SPARE_STREAMS, ConnectionLimits
from specdec.v1 import drafter_pb2_grpc


class DrafterServer:
    """The parts of a drafter process."""

    def __init__(
        self,
        config: DrafterConfig,
        telemetry: Telemetry,
        families: Mapping[str, DrafterFactory] = FAMILIES,
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._families = families
        self._watchdog: Watchdog | None = None
        self._outgoing_tls = config.outgoing_tls()
        calls = OpenCalls()
        self.servicer = DrafterServicer(
            telemetry, SessionRules(config.session_callers, config.idle_timeout_s), calls
        )
        register = partial(drafter_pb2_grpc.add_DrafterServiceServicer_to_server, self.servicer)
        self.host = ServiceHost(
            SERVICE_NAME,
            register,
            config.listen,
            tls=config.server_tls,
            health_listen=config.health_listen,
            # A gateway has all its sessions on one connection.
            limits=ConnectionLimits(max_streams=config.max_sessions + SPARE_STREAMS),
            calls=calls,
        )
        self._thread = ModelThread(SERVICE_NAME)  # last: a wrong configuration leaves no thread behind

    async def load(self) -> None:
        """Load the drafters off the event loop, so that health checks are answered meanwhile."""
        drafters = await asyncio.wrap_future(
            self._thread.submit(lambda: load_drafters(self._config, self._families))
        )
        reader = None
        if any(drafter.traits.target_state_spec for drafter in drafters.values()):
            # Imported here: a process with the ngram drafter alone starts without torch.
            from drafter_service.state import load_reader

            reader = await asyncio.wrap_future(
                self._thread.submit(
                    lambda: load_reader(self._config, self._outgoing_tls, self.servicer.metrics.add_link)
                )
            )
        metrics = self.servicer.metrics
        host = DrafterHost(drafters, self._config, self._thread, reader, on_step=metrics.engine.add_step)
        metrics.observe(host)
        self.servicer.host = host
        self._watchdog = Watchdog(
            host.engine, timeout_s=self._config.step_timeout_s, set_serving=self.host.set_serving
        )

    async def close(self) -> None:
        """Stop the engine and send what telemetry is buffered."""
        if self.servicer.host:
            await asyncio.to_thread(self.servicer.host.close)
            if self._watchdog:  # until now: an engine that hangs does not close
                await self._watchdog.close()
            if self.servicer.host.reader:
                await self.servicer.host.reader.close()
        self._thread.close(wait=False)  # without waiting for a load under way
        await asyncio.to_thread(self._telemetry.shutdown)

    async def run(self) -> None:
        """Serve until a signal, then drain."""
        await run_service(self.host, load=self.load, close=self.close, grace_s=self._config.drain_grace_s)
