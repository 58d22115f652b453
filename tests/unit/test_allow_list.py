"""Which addresses an allow-list allows, however they are written."""

from __future__ import annotations

import pytest

from specdec.contract.errors import InvalidArgumentError
from specdec.transport.allow_list import LOCAL, AllowList

ALLOWED = [
    (LOCAL, "127.0.0.1:50051"),
    (LOCAL, "ipv4:127.8.8.8:1"),
    (LOCAL, "[::1]:50051"),
    (LOCAL, "ipv6:[::1]:50051"),
    (LOCAL, "dns:///localhost:50051"),
    (LOCAL, "unix:/run/verifier.sock"),
    (LOCAL, "unix-abstract:verifier"),
    ("10.0.0.0/8:50051", "10.1.2.3:50051"),
    ("10.1.2.3", "10.1.2.3:22"),
    ("[fd00::/8]:50051", "[fd00::7]:50051"),
    ("verifier-*.example.org:50051", "verifier-3.example.org:50051"),
    ("other:1, verifier:50051", "dns:verifier:50051"),
    ("*:50051", "10.9.9.9:50051"),
    ("*", "anywhere:7"),
    ("dns:///localhost:50051", "127.0.0.1:50051"),
]
REFUSED = [
    ("", "127.0.0.1:50051"),
    (LOCAL, "10.0.0.1:50051"),
    (LOCAL, "localhost.example.org:50051"),
    (LOCAL, "127.0.0.1.example.org:50051"),
    (LOCAL, "2130706433:50051"),
    (LOCAL, "127.0.0.1"),
    (LOCAL, "xds:///127.0.0.1:50051"),
    (LOCAL, "dns://10.0.0.1/localhost:50051"),
    (LOCAL, "ipv4:127.0.0.1:1,10.0.0.1:2"),
    (LOCAL, "dns:///10%2e0.0.1:50051"),
    ("*", "xds:///verifier"),
    ("*", "https://verifier:50051"),
    ("*", "unix:/run/verifier.sock"),
    ("unix", "127.0.0.1:50051"),
    ("10.0.0.0/8:50051", "10.1.2.3:22"),
    ("10.0.0.0/8:50051", "11.1.2.3:50051"),
    ("10.*:50051", "10.1.2.3:50051"),
    ("verifier:50051", "a-verifier:50051"),
    ("dns:///localhost:50051", "127.0.0.1:22"),
    ("dns:///localhost:50051", "10.0.0.1:50051"),
    ("dns:///no-such-name.invalid:50051", "10.0.0.1:50051"),
    (f"dns:///{'x' * 70}.org:50051", "10.0.0.1:50051"),
]


@pytest.mark.parametrize(("entries", "uri"), ALLOWED)
async def test_allowed(entries: str, uri: str) -> None:
    assert await AllowList(entries).allows(uri)


@pytest.mark.parametrize(("entries", "uri"), REFUSED)
async def test_refused(entries: str, uri: str) -> None:
    assert not await AllowList(entries).allows(uri)


@pytest.mark.parametrize(
    "entry",
    ["xds:///verifier", "host:port", "unix:/run/x", "dns:///name", "dns:///a*:1", "a/b:1", "http://a:1"],
)
def test_what_is_no_address(entry: str) -> None:
    with pytest.raises(InvalidArgumentError, match="names no addresses"):
        AllowList(f"loopback,{entry}")
