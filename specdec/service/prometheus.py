"""The Prometheus endpoint of a service: its metrics at /metrics, by a server on a thread of its own."""

from __future__ import annotations

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry, start_http_server

from specdec.contract.errors import InvalidArgumentError
from specdec.service.config import parse_address


class PrometheusEndpoint:
    """Serves what `reader` collects, each time it is asked for. The reader belongs into a MeterProvider.

    Args:
        listen: host:port; port 0: a free one.

    Raises:
        InvalidArgumentError: no such address, or the port is in use.
    """

    def __init__(self, listen: str) -> None:
        host, port = parse_address(listen, "metrics_listen")
        # A registry of its own: two services of one process have an endpoint each.
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise InvalidArgumentError(
                f"Cannot serve metrics on {listen}: {error.strerror or error}. Pass another address with "
                "--metrics-listen, or an empty one for no metrics endpoint.",
                field="metrics_listen",
                reason="ADDRESS_IN_USE",
            ) from error
        self.reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
        self.address = f"{listen.rpartition(':')[0]}:{self._server.server_port}"
        """Where it listens, with the real port."""

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
