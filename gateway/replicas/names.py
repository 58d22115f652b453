"""Addresses of a service's name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""Addresses of a `dns:` URI, as gRPC URIs; OSError if it cannot be resolved."""


def is_name(uri: str) -> bool:
    """Return whether a URI stands for every address its name has."""
    return uri.startswith("dns:")


def host_of(uri: str) -> str:
    """Return the host of `dns:[//authority/]host:port`."""
    return uri.removeprefix("dns:").rpartition("/")[2].rpartition(":")[0].strip("[]")


async def resolve_name(uri: str) -> list[str]:
    """Return every address of `dns:[//authority/]host:port`, by the system's resolver.

    Raises:
        OSError: the name is unknown, or the name server does not answer.
    """
    port = uri.rpartition(":")[2]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host_of(uri), int(port), type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a part of the name is empty or too long to be asked for
        raise OSError(f"{uri} does not hold a host name: {error}") from error
    addresses = {(family, address[0]) for family, _, _, _, address in found}
    return sorted(
        f"ipv6:[{ip}]:{port}" if family == socket.AF_INET6 else f"ipv4:{ip}:{port}"
        for family, ip in addresses
    )
