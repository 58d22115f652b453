"""An authority of a test's own, and certificates it signs."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = dt.timedelta(days=1)
_LOCAL = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, PEM."""

    certificate: bytes
    private_key: bytes


@dataclass(frozen=True)
class Authority:
    """Signs certificates."""

    name: str = "test authority"
    key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        builder = self._builder(_name(self.name), self.key.public_key(), days=30)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, *, days: int = 30, names: tuple[x509.GeneralName, ...] = _LOCAL) -> Issued:
        """A certificate for server and client, by default of this host; `days` < 0: expired."""
        key = _new_key()
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._builder(_name("service"), key.public_key(), days)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        signed = builder.sign(self.key, hashes.SHA256())
        return Issued(signed.public_bytes(serialization.Encoding.PEM), _pem_of(key))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return x509.CertificateBuilder(
            issuer_name=_name(self.name),
            subject_name=subject,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - 10 * _DAY,
            not_valid_after=now + days * _DAY,
        )


def replace(path: Path, content: bytes) -> None:
    """Write a file the way those who rotate certificates do: nobody ever reads half of it."""
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
