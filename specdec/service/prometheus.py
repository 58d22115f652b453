"""The Prometheus endpoint of a service, which serves /metrics from a thread of its own."""

from __future__ import annotations

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry, start_http_server

from specdec.contract.errors import InvalidArgumentError
from specdec.service.config import parse_address


class PrometheusEndpoint:
    """Serves the metrics that `reader` collects on each request. Add the reader to a MeterProvider.

    Args:
        listen: host:port; port 0 is any free port.

    Raises:
        InvalidArgumentError: the address is malformed or cannot be bound.
    """

    def __init__(self, listen: str) -> None:
        host, port = parse_address(listen, "metrics_listen")
        # Each endpoint has its own registry, because two services of one process have one endpoint each.
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise InvalidArgumentError(
                f"Cannot serve metrics on {listen}: {error.strerror or error}. Pass another address with "
                "--metrics-listen, or an empty address to serve no metrics.",
                field="metrics_listen",
                reason="ADDRESS_IN_USE",
            ) from error
        self.reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
        self.address = f"{listen.rpartition(':')[0]}:{self._server.server_port}"
        """The address of the endpoint, with the real port."""

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
