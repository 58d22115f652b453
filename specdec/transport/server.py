"""The gRPC arguments of a server, and what it lets one connection have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from specdec.contract.bounds import MAX_NUMBER
from specdec.transport.channel import MAX_MESSAGE_BYTES, Keepalive, fixed_window

SERVER_KEEPALIVE = Keepalive(30.0, 10.0)
"""Of a server: what a peer that is gone still holds is free within a minute."""
SERVER_WINDOW_BYTES = 128 * 1024
"""What a client may send on a stream before the service reads. A peer may fill it on every stream."""
MAX_CONNECTION_AGE_S = 1800
"""Age at which a server closes a connection to new calls, seconds, give or take a tenth. The client then
looks the name up again and finds new replicas; running calls continue on the old connection."""
HANDSHAKE_TIMEOUT_S = 20.0
"""How long a new connection may take until it can have calls, its TLS included, seconds."""
HEALTH_MESSAGE_BYTES = 4096
"""Largest message of a port that answers health checks only."""
SPARE_STREAMS = 64
"""How many calls besides its sessions a service may have on a connection: health, what it is, and sessions
that are refused because there is no room."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a server lets each of its connections have."""

    max_streams: int = 128
    """Most calls at a time. Further calls wait at the client, and those of a client that does not wait are
    refused."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message that the server receives."""
    idle_s: float = 0.0
    """How long a connection without a call stays open, seconds. 0: until it has the age at which every
    connection ends."""
    max_age_s: float = 0.0
    """Age at which it takes no new calls, seconds. 0: MAX_CONNECTION_AGE_S."""
    age_grace_s: float = math.inf
    """Seconds for which running calls may continue after that."""


DEFAULT_LIMITS = ConnectionLimits()


def server_options(limits: ConnectionLimits = DEFAULT_LIMITS) -> list[tuple[str, Any]]:
    """Return the arguments of a server. Servers never share a port: that would split the traffic."""
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", min(limits.max_message_bytes, MAX_NUMBER)),
        ("grpc.max_send_message_length", -1),
        *SERVER_KEEPALIVE.options(),
        # By default gRPC closes the connection of a client that pings more often than every five minutes.
        # Other gRPC libraries let their users ping every few seconds, and a call may be silent for longer.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_concurrent_streams", min(limits.max_streams, MAX_NUMBER)),
        *fixed_window(SERVER_WINDOW_BYTES),
        ("grpc.max_connection_age_ms", _milliseconds(limits.max_age_s or MAX_CONNECTION_AGE_S)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(limits.age_grace_s)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT_S)),
    ]
    if limits.idle_s:
        options.append(("grpc.max_connection_idle_ms", _milliseconds(limits.idle_s)))
    return options


def _milliseconds(seconds: float) -> int:
    """Return a time as gRPC takes it: past its largest number there is no limit."""
    return max(1, round(min(seconds * 1000, MAX_NUMBER)))
