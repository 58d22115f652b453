"""The verifier server, put together from its parts."""

from __future__ import annotations

import asyncio
import socket
from functools import partial

from specdec.runtime.memory import StateMemory
from specdec.runtime.model_thread import ModelThread
from specdec.service.host import ServiceHost
from specdec.service.interceptors import OpenCalls
from specdec.service.process import run_service
from specdec.service.sessions import SessionRules
from specdec.service.telemetry import Telemetry
from specdec.service.watchdog import Watchdog
from specdec.transport.server import SPARE_STREAMS, ConnectionLimits
from specdec.v1 import verifier_pb2_grpc
from verifier_service.config import VerifierConfig
from verifier_service.service import SERVICE_NAME, VerifierServicer
from verifier_service.state_memory import make_memory
from verifier_service.state_stream import MAX_STREAMS_PER_SESSION
from verifier_service.verifier import Verifier


class VerifierServer:
    """The parts of a verifier process: they start, run and close together."""

    def __init__(self, config: VerifierConfig, telemetry: Telemetry) -> None:
        self._config = config
        self._telemetry = telemetry
        self._memory: StateMemory | None = None
        self._watchdog: Watchdog | None = None
        calls = OpenCalls()
        self.servicer = VerifierServicer(
            telemetry, SessionRules(config.session_callers, config.idle_timeout_s), calls
        )
        register = partial(verifier_pb2_grpc.add_VerifierServiceServicer_to_server, self.servicer)
        self.host = ServiceHost(
            SERVICE_NAME,
            register,
            config.listen,
            tls=config.server_tls,
            health_listen=config.health_listen,
            # A gateway has all its sessions on one connection, and a drafter all the state that it reads.
            limits=ConnectionLimits(
                max_streams=config.max_sessions * MAX_STREAMS_PER_SESSION + SPARE_STREAMS
            ),
            calls=calls,
        )
        self._thread = ModelThread(SERVICE_NAME)  # last: a wrong configuration leaves no thread behind

    async def load(self) -> None:
        """Load the model on the engine thread, so that the event loop can answer health checks."""
        uri = self._config.advertise or _reachable(self.host.address)
        self._memory = memory = make_memory(self._config)
        metrics = self.servicer.metrics
        verifier = await asyncio.wrap_future(
            self._thread.submit(
                lambda: Verifier.load(
                    self._config,
                    self._thread,
                    memory=memory,
                    uri=uri,
                    on_step=metrics.engine.add_step,
                    on_preempted=lambda: metrics.preempted_sessions.add(1),
                )
            )
        )
        metrics.observe(verifier)
        self.servicer.verifier = verifier
        self._watchdog = Watchdog(
            verifier.engine,
            timeout_s=self._config.step_timeout_s,
            set_serving=self.host.set_serving,
            before_the_end=memory.close,
        )

    async def close(self) -> None:
        """Stop the engine and send the buffered telemetry."""
        if self.servicer.verifier:
            await asyncio.to_thread(self.servicer.verifier.close)
        if self._watchdog:  # until now: an engine that hangs does not close
            await self._watchdog.close()
        if self._memory:
            self._memory.close()  # even after a partial load: no file may stay in the shared directory
        self._thread.close(wait=False)  # do not wait for a load that still runs
        await asyncio.to_thread(self._telemetry.shutdown)

    async def run(self) -> None:
        """Serve until a signal, then drain."""
        await run_service(self.host, load=self.load, close=self.close, grace_s=self._config.drain_grace_s)


def _reachable(address: str) -> str:
    """Return the address that peers can use: this host's name if the server listens on every interface."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]", "*") else address
