"""The process of a server, from its command line to its exit code, with a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn, Protocol, TypeVar

import click
import uvloop

from specdec.contract.errors import SpecdecError
from specdec.models.extra import models_extra
from specdec.service.exporters import telemetry_from_environment
from specdec.service.host import ServiceHost
from specdec.service.logs import setup_logging
from specdec.service.telemetry import Telemetry

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")


async def run_service(
    host: ServiceHost,
    *,
    load: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
    grace_s: float,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        load: makes the service ready. It runs after the port is open, so that health checks get an answer.
        close: frees everything that `load` made.

    Raises:
        SpecdecError: the address cannot be bound, or `load` failed.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    address = await host.start()
    logger.info("listening", extra={"address": address})
    loading = asyncio.ensure_future(load())
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            host.set_serving()
            logger.info("serving", extra={"address": address})
            await stopped
        logger.info("draining", extra={"grace_s": grace_s})
    finally:
        for task in (loading, stopped):
            task.cancel()
        await asyncio.gather(loading, stopped, return_exceptions=True)
        await host.stop(grace_s)
        await close()
    logger.info("stopped")


class RunnableServer(Protocol):
    """A server that is ready to run."""

    async def run(self) -> None:
        """Serve until a signal, then drain."""


def serve_from_command_line(
    name: str,
    config_type: Callable[..., ConfigT],
    options: Mapping[str, object],
    make_server: Callable[[ConfigT, Telemetry], RunnableServer],
) -> NoReturn:
    """Run a service process. It exits with 0 after a drain, with 2 and a message if the set-up is wrong."""
    try:
        config = config_type(**options)
    except SpecdecError as error:
        raise click.UsageError(error.message) from error
    setup_logging(name, str(options["log_level"]))

    async def serve() -> None:
        # The server must be made on the event loop on which it serves.
        telemetry = telemetry_from_environment(name, str(options["metrics_listen"]))
        await make_server(config, telemetry).run()

    try:
        with models_extra():
            uvloop.run(serve())
    except SpecdecError as error:
        logger.error(error.message, extra={"reason": error.reason})
        _exit(2)
    except Exception:
        logger.exception("the service failed")
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """End the process at once.

    A cancelled load still runs native code on its thread, which would make a normal exit of the interpreter
    abort.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
