"""The log of a service process: one JSON object per record, with request and trace ids."""

from __future__ import annotations

import logging
import sys

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from specdec.contract.request_id import REQUEST_ID


class _RequestFilter(logging.Filter):
    """Adds the current request's id, and its trace and span id, to log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := REQUEST_ID.get():
            record.request_id = request_id
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = trace.format_trace_id(context.trace_id)
            record.span_id = trace.format_span_id(context.span_id)
        return True


def setup_logging(service_name: str, level: str = "INFO") -> None:
    """Log one JSON object per line on stderr, with trace ids where a trace is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"service": service_name},
        )
    )
    handler.addFilter(_RequestFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    quiet_grpc()


def quiet_grpc() -> None:
    """Silence debug records of gRPC's core: at that level it logs a server that is being freed, and the
    record, with the server in it, is freed a second time: the process dies.
    """
    logging.getLogger("grpc._cython").setLevel(logging.INFO)
