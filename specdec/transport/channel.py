"""gRPC channels and their options: message sizes, keepalive, load balancing and TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from specdec.contract.errors import InvalidArgumentError
from specdec.transport.tls import OutgoingTls, Pem, PemFiles, channel_credentials

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message that clients and model services receive; larger tensors travel in chunks."""

CLIENT_WINDOW_BYTES = 1024 * 1024
"""What a service may send on a stream before its client reads. A wider one is not faster on loopback."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """How soon a side notices that its peer is gone, stopped or cut off, although the connection is open.

    A peer's own threads answer pings: a process that is busy, or that waits for a pass, answers at once.
    """

    time_s: float
    """Seconds between two pings of a silent connection."""
    timeout_s: float
    """Seconds within which the peer must answer, or the connection and its calls end."""

    def options(self) -> list[tuple[str, Any]]:
        """Return the channel arguments."""
        return [
            ("grpc.keepalive_time_ms", int(self.time_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.timeout_s * 1000)),
            # Without this, gRPC waits a minute for the answer to a ping, whatever keepalive says.
            ("grpc.http2.ping_timeout_ms", int(self.timeout_s * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
        ]


SERVICE_KEEPALIVE = Keepalive(2.0, 2.5)
"""Of a service that calls another one, whose sessions go on elsewhere within five seconds."""
CLIENT_KEEPALIVE = Keepalive(10.0, 4.0)
"""Of a client, whose answers end with an error within fifteen seconds. It may be far away, and there may be
proxies between, which rarely take more pings."""
_RESOLVE_INTERVAL_S = 1
"""How soon a client may look a name up again, seconds. By default gRPC waits for 30 s, whatever happens."""
_RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.3s",
    "backoffMultiplier": 2.5,
    "maxBackoff": "5s",
    # A server that ends cancels the calls that reach it before its clients hear that it ends.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
"""How a call is tried again that no server behind a name takes, within eight seconds: all that are known may
have gone, and the name may be about to tell of others. Once an answer begins, nothing is tried again."""

CLIENT_IDLE_S = 120.0
"""Seconds after its last call at which a client lets its connection go; the next call makes another one. That
is sooner than a gateway ends it: the end by a server can meet a call, and gRPC writes a line about it."""
_RETIRE_AFTER_S = 10.0
"""Seconds for which a channel with outdated credentials still accepts calls from its holders."""
_RETIRED_GRACE_S = 24 * 3600.0
"""Seconds for which calls may continue on such a channel after that."""
MAX_SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket that the kernel takes."""
URI_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The PEM files of a client. All unset: gRPC's default roots, without a client certificate."""

    root_certificates: Path | None = None
    """The authorities that may have signed the server's certificate."""
    private_key: Path | None = None
    """The key of the client certificate, for mutual TLS."""
    certificate_chain: Path | None = None
    """The client certificate, for mutual TLS."""
    server_name: str = ""
    """The name that the server's certificate must carry. Empty: the host name of the address."""

    @classmethod
    def from_environment(cls) -> TlsConfig | None:
        """Read SPECDEC_TLS_AUTHORITIES, _PRIVATE_KEY, _CERTIFICATE and _SERVER_NAME; None if none is set."""
        names = ("AUTHORITIES", "PRIVATE_KEY", "CERTIFICATE")
        values = [os.environ.get(f"SPECDEC_TLS_{name}", "") for name in names]
        server_name = os.environ.get("SPECDEC_TLS_SERVER_NAME", "")
        if not any((*values, server_name)):
            return None
        authorities, key, certificate = (Path(value) if value else None for value in values)
        return cls(authorities, key, certificate, server_name)

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files and make channel credentials of them.

        Raises:
            InvalidArgumentError: a file cannot be read, or key and certificate do not match.
        """
        files = PemFiles(self.root_certificates, self.private_key, self.certificate_chain)
        return channel_credentials(files.read())


def client_options(
    uri: str, service: str = "", server_name: str = "", keepalive: Keepalive = CLIENT_KEEPALIVE
) -> list[tuple[str, Any]]:
    """Return the channel arguments of a client.

    Args:
        uri: where the channel goes. An http_proxy of the environment is ignored for addresses of this host. A
            `dns:` URI stands for all servers that have the name, now and later; see _RETRIES.
        service: full name of the gRPC service, "specdec.v1.VerifierService" for example, whose health decides
            which backends of a `dns:` name are used. Empty: health is not checked.
        server_name: replaces the name that the server's certificate must carry. Empty: the name is kept.
        keepalive: how soon a peer that is silent is given up.
    """
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if service:
        service_config["healthCheckConfig"] = {"serviceName": service}
    if uri.startswith("dns:"):
        service_config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRIES}]
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        *keepalive.options(),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.dns_min_time_between_resolutions_ms", _RESOLVE_INTERVAL_S * 1000),
        *fixed_window(CLIENT_WINDOW_BYTES),
        # A new channel tries at once, even while an older one of this process waits to try again.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", json.dumps(service_config)),
    ]
    if is_local(uri):
        options.append(("grpc.enable_http_proxy", 0))
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def fixed_window(num_bytes: int) -> list[tuple[str, Any]]:
    """Return the options that set a stream's window.

    By default gRPC measures the connection and raises the window: on a fast one, to hundreds of megabytes.
    """
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", num_bytes)]


def is_local(uri: str) -> bool:
    """Return whether an address always means this host: a unix socket, "localhost" or a loopback address."""
    if uri.startswith(("unix:", "unix-abstract:")):
        return True
    scheme = next((scheme for scheme in URI_SCHEMES if uri.startswith(scheme)), "")
    host = uri.removeprefix(scheme).rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_path(uri: str) -> str:
    """Return the path of a unix socket's file; it is empty for every other address."""
    return uri.removeprefix("unix:").removeprefix("//") if uri.startswith("unix:") else ""


def check_socket_path(path: str) -> None:
    """Refuse a path that no unix socket can have.

    Raises:
        InvalidArgumentError: the path is too long.
    """
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_SOCKET_PATH_BYTES:
        raise InvalidArgumentError(
            f"The path of a unix socket may have at most {MAX_SOCKET_PATH_BYTES} bytes, but {path} has "
            f"{num_bytes}; choose a shorter one.",
            reason="SOCKET_PATH_TOO_LONG",
        )


def parse_uris(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of gRPC URIs or host:port pairs.

    Raises:
        InvalidArgumentError: the list is empty, or an entry is not an address.
    """
    uris = tuple(part.strip() for part in text.split(",") if part.strip())
    if not uris:
        raise InvalidArgumentError(
            "The address is empty; pass host:port, dns:///host:port, unix:/path, or several, comma-separated."
        )
    for uri in uris:
        if path := socket_path(uri):
            check_socket_path(path)
        if uri.startswith(URI_SCHEMES) and not uri.startswith("dns:"):
            continue
        host, _, port = uri.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InvalidArgumentError(
                f"{uri!r} is not a gRPC address; write host:port, dns:///host:port or unix:/path."
            )
    return uris


def _idle_option() -> tuple[str, int]:
    return ("grpc.client_idle_timeout_ms", int(CLIENT_IDLE_S * 1000))


def aio_channel(uri: str, *, service: str = "", tls: TlsConfig | None = None) -> grpc.aio.Channel:
    """Open an asyncio channel. Call this on the event loop that will use the channel."""
    server_name = tls.server_name if tls else ""
    options = [*client_options(uri, service, server_name), _idle_option()]
    return _aio_channel(uri, tls.credentials() if tls else None, options)


def _aio_channel(
    uri: str, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]
) -> grpc.aio.Channel:
    if credentials:
        return grpc.aio.secure_channel(uri, credentials, options=options)
    return grpc.aio.insecure_channel(uri, options=options)


class ServiceChannel:
    """A channel from one service to another; a new channel replaces it when the certificates change.

    Args:
        uri: one address of the service that is called.
        service: see `client_options`.
        tls: credentials of the calls; None: calls are not encrypted.
        server_name: name that the peer's certificate must carry if `tls` has none; empty: the address's.
    """

    def __init__(
        self, uri: str, *, service: str = "", tls: OutgoingTls | None = None, server_name: str = ""
    ) -> None:
        self._uri = uri
        self._service = service
        self._tls = tls
        self._server_name = (tls.server_name if tls else "") or server_name
        self._pem = tls.latest() if tls else None
        self._channel = self._connect(self._pem)
        self._retiring: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """Return the channel for a new call. Calls on a replaced channel continue until they end."""
        if self._tls and (pem := self._tls.latest()) is not self._pem:
            task = asyncio.ensure_future(_retire(self._channel))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            self._pem, self._channel = pem, self._connect(pem)
        return self._channel

    async def close(self) -> None:
        """Close the channel and all that it replaced; running calls are cancelled."""
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._channel.close()

    def _connect(self, pem: Pem | None) -> grpc.aio.Channel:
        credentials = channel_credentials(pem) if pem else None
        options = client_options(self._uri, self._service, self._server_name, SERVICE_KEEPALIVE)
        return _aio_channel(self._uri, credentials, options)


async def _retire(channel: grpc.aio.Channel) -> None:
    try:
        await asyncio.sleep(_RETIRE_AFTER_S)
        await channel.close(grace=_RETIRED_GRACE_S)
    except asyncio.CancelledError:
        await channel.close()
        raise


def sync_channel(uri: str, *, tls: TlsConfig | None = None) -> grpc.Channel:
    """Open a blocking channel."""
    options = [*client_options(uri, server_name=tls.server_name if tls else ""), _idle_option()]
    if tls:
        return grpc.secure_channel(uri, tls.credentials(), options=options)
    return grpc.insecure_channel(uri, options=options)
