"""Which addresses a service may call, where another party names the address."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

from specdec.contract.errors import InvalidArgumentError

UNIX = "unix"
"""Entry that stands for all Unix sockets."""
LOOPBACK = "loopback"
"""Entry that stands for all TCP addresses of this host alone."""
LOCAL = f"{LOOPBACK},{UNIX}"

_RESOLVE_TIMEOUT_S = 5.0
_RESOLVE_PAUSE_S = 1.0
"""Time between two look-ups of a name: addresses that are not its own must not cost one each."""
_TCP_SCHEME = re.compile(r"(dns:(///)?|ipv4:|ipv6:)?")
_HOST_AND_PORT = re.compile(
    r"(?P<host>[\w.*-]+|\[[0-9a-fA-F:.]+(/\d+)?\]|[\d.]+/\d+)(:(?P<port>\d+))?", re.ASCII
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Entry:
    """Addresses that are allowed."""

    host: str = ""
    """Pattern of host names, in which * stands for any characters; "*" alone is every host."""
    networks: tuple[Network, ...] = ()
    """Networks of IP addresses, in place of a host."""
    port: str = ""
    """Empty: every port."""
    is_resolved: bool = False
    """Whether the addresses that the host name has are allowed, in place of the name."""

    def allows(self, host: str, port: str) -> bool:
        """Return whether it names a host and port."""
        if self.port not in ("", port):
            return False
        if self.host == "*":
            return True
        address = _ip_address(host)
        if address is None:
            return not self.is_resolved and fnmatchcase(host, self.host)
        return any(address in network for network in self.networks)


_LOOPBACK_ENTRIES = (
    _Entry("localhost"),
    _Entry(networks=(ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"))),
)


class AllowList:
    """The addresses that may be called. Used from one event loop.

    Args:
        text: entries, separated by commas: "loopback", "unix", HOST[:PORT] with * for any characters,
            NETWORK[:PORT] such as 10.0.0.0/8:50051, or dns:///NAME:PORT for the addresses that NAME has.

    Raises:
        InvalidArgumentError: an entry is none of these.
    """

    def __init__(self, text: str) -> None:
        names = [part.strip() for part in text.split(",") if part.strip()]
        self._unix = UNIX in names
        self._entries = [
            entry
            for name in names
            if name != UNIX
            for entry in (_LOOPBACK_ENTRIES if name == LOOPBACK else (_parse(name),))
        ]
        self._resolved: dict[_Entry, frozenset[str]] = {}
        self._resolved_at = -_RESOLVE_PAUSE_S
        self._resolving = asyncio.Lock()

    async def allows(self, uri: str) -> bool:
        """Return whether a gRPC URI may be called. Names are looked up where they decide."""
        if uri.startswith(("unix:", "unix-abstract:")):
            return self._unix
        match = _HOST_AND_PORT.fullmatch(_TCP_SCHEME.sub("", uri, count=1))
        if match is None or not match["port"] or "/" in match["host"] or "*" in match["host"]:
            return False
        host, port = match["host"].strip("[]"), match["port"]
        if any(entry.allows(host, port) for entry in self._entries):
            return True
        address = _ip_address(host)
        return address is not None and await self._has_a_name(str(address), port)

    async def _has_a_name(self, address: str, port: str) -> bool:
        names = [entry for entry in self._entries if entry.is_resolved]
        async with self._resolving:
            if not self._is_known(address, port) and time.monotonic() - self._resolved_at > _RESOLVE_PAUSE_S:
                self._resolved = {entry: await _resolve(entry.host) for entry in names}
                self._resolved_at = time.monotonic()
            return self._is_known(address, port)

    def _is_known(self, address: str, port: str) -> bool:
        return any(entry.port == port and address in known for entry, known in self._resolved.items())


def _parse(name: str) -> _Entry:
    is_resolved = name.startswith("dns:")
    match = _HOST_AND_PORT.fullmatch(name.removeprefix("dns:").removeprefix("///") if is_resolved else name)
    if match is None or (is_resolved and (not match["port"] or "*" in match["host"])):
        raise InvalidArgumentError(
            f"{name!r} names no addresses; write {LOOPBACK}, {UNIX}, HOST:PORT, NETWORK:PORT such as "
            "10.0.0.0/8:50051, or dns:///NAME:PORT.",
            reason="INVALID_ADDRESS",
        )
    host, port = match["host"].strip("[]"), match["port"] or ""
    try:
        return _Entry(networks=(ipaddress.ip_network(host, strict=False),), port=port)
    except ValueError:
        return _Entry(host, port=port, is_resolved=is_resolved)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def _resolve(name: str) -> frozenset[str]:
    """Return the addresses of a name; none where it has none, or the look-up takes too long."""
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError):  # the last: a part of the name is too long to be asked for
        return frozenset()
    return frozenset(str(entry[4][0]) for entry in found)
