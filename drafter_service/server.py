"""Put a drafter service together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from drafter_service.config import DrafterConfig
from drafter_service.host import DrafterHost
from drafter_service.registry import FAMILIES, DrafterFactory, load_drafters
from drafter_service.service import SERVICE_NAME, DrafterServicer
from specdec.runtime.engine import model_thread
from specdec.server import ServiceHost, run_service
from specdec.telemetry import Telemetry
from specdec.v1 import drafter_pb2_grpc


class DrafterServer:
    """One drafter process's parts, in the order they start."""

    def __init__(
        self,
        config: DrafterConfig,
        telemetry: Telemetry,
        families: Mapping[str, DrafterFactory] = FAMILIES,
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._thread = model_thread(SERVICE_NAME)
        self._families = families
        self.servicer = DrafterServicer(telemetry)
        register = partial(drafter_pb2_grpc.add_DrafterServiceServicer_to_server, self.servicer)
        self.host = ServiceHost(SERVICE_NAME, register, config.listen)

    async def load(self) -> None:
        """Load the drafters off the event loop, so that health checks are answered meanwhile."""
        loop = asyncio.get_running_loop()
        drafters = await loop.run_in_executor(self._thread, load_drafters, self._config, self._families)
        self.servicer.host = DrafterHost(drafters, self._config, self._thread)

    async def close(self) -> None:
        """Stop the engine and send what telemetry is buffered."""
        if self.servicer.host:
            await asyncio.to_thread(self.servicer.host.close)
        self._thread.shutdown()
        await asyncio.to_thread(self._telemetry.shutdown)

    async def run(self) -> None:
        """Serve until a signal, then drain."""
        await run_service(self.host, load=self.load, close=self.close, grace_s=self._config.drain_grace_s)
