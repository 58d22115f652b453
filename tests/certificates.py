"""An authority of a test's own, and certificates it signs."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path

import trustme

LOCAL = ("localhost", "127.0.0.1")
"""Names of this host."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, PEM."""

    certificate: bytes
    private_key: bytes


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "test authority") -> None:
        self._ca = trustme.CA(organization_name=name)

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self._ca.cert_pem.bytes()

    def issue(self, *names: str, days: int = 30, is_local: bool = True) -> Issued:
        """Issue a certificate for server and client that names `names`, and this host unless not `is_local`.
        With `days` < 0 it has expired.
        """
        not_after = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        issued = self._ca.issue_cert(*(LOCAL if is_local else ()), *names, not_after=not_after)
        return Issued(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())


def replace(path: Path, content: bytes) -> None:
    """Replace a file as programs that rotate certificates do: a reader never sees half of it."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)  # noqa: PTH105


@dataclass(frozen=True)
class Folder:
    """The three files of one party, and the options that name them."""

    path: Path

    def write(self, issued: Issued, *authorities: Authority) -> Folder:
        """Put certificate and key in place, and the authorities trusted."""
        replace(self.path / "ca.pem", b"".join(authority.pem for authority in authorities))
        replace(self.path / "key.pem", issued.private_key)
        replace(self.path / "cert.pem", issued.certificate)
        return self

    @property
    def options(self) -> dict[str, str]:
        """Options of a service with mutual TLS on every side."""
        return {
            "tls_certificate": str(self.path / "cert.pem"),
            "tls_private_key": str(self.path / "key.pem"),
            "tls_authorities": str(self.path / "ca.pem"),
            "tls_client_authorities": str(self.path / "ca.pem"),
        }
