"""Certificates of services and clients: checked when read, read anew when their files change."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

from specdec.contract.errors import InvalidArgumentError

logger = logging.getLogger(__name__)

_NUM_TRIES = 3
"""Readings before files that keep changing are given up, until the next look at them."""


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files held, certificate and key being a pair; None: not configured."""

    authorities: bytes | None = None
    private_key: bytes | None = None
    certificate: bytes | None = None


@dataclass(frozen=True, slots=True)
class PemFiles:
    """PEM files that are used together."""

    authorities: Path | None = None
    """Who may have signed the peer's certificate."""
    private_key: Path | None = None
    certificate: Path | None = None
    """Own certificate, and those between it and an authority."""

    def read(self) -> Pem:
        """What the files hold, all of one moment.

        Raises:
            InvalidArgumentError: one is missing or no PEM, or key and certificate do not match.
        """
        if (self.private_key is None) != (self.certificate is None):
            given, missing = ("certificate", "private key")[:: 1 if self.certificate else -1]
            raise _refused(f"A TLS {given} is given without its {missing}; give both or neither.")
        for _ in range(_NUM_TRIES):
            pem = self._contents()
            self._check(pem)
            # The check reads the files itself; contents that stayed the same around it are those it saw.
            if pem == self._contents():
                return pem
        raise _refused(f"The TLS files {self} keep changing while they are read.")

    def stamp(self) -> tuple[object, ...]:
        """Differs once a file was written or replaced."""
        return tuple(_stamp(path) for path in (self.authorities, self.private_key, self.certificate))

    def _contents(self) -> Pem:
        return Pem(_read(self.authorities), _read(self.private_key), _read(self.certificate))

    def _check(self, pem: Pem) -> None:
        if pem.authorities is not None:
            _check_authorities(pem.authorities, self.authorities)
        if self.certificate and self.private_key:
            _check_pair(self.certificate, self.private_key)

    def __str__(self) -> str:
        return ", ".join(str(path) for path in (self.certificate, self.private_key, self.authorities) if path)


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise InvalidArgumentError(f"A TLS file cannot be read: {error}", field="tls") from error


def _stamp(path: Path | None) -> object:
    try:
        status = path.stat() if path else None
    except OSError as error:
        return error.errno
    return status and (status.st_ino, status.st_mtime_ns, status.st_size)


def _check_authorities(pem: bytes, path: Path | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
    except (ssl.SSLError, ValueError) as error:
        raise _refused(f"{path} holds no PEM certificate authorities ({error}).") from error


def _check_pair(certificate: Path, private_key: Path) -> None:
    def no_password() -> NoReturn:
        raise ValueError("the key is encrypted")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, no_password)
    except (ssl.SSLError, ValueError) as error:
        raise _refused(
            f"{certificate} and {private_key} are no PEM certificate and its plain private key ({error})."
        ) from error
    except OSError as error:
        raise _refused(f"A TLS file cannot be read: {error}") from error


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="tls")


class PemWatch:
    """The newest good contents of PEM files. May be used from any thread.

    Raises:
        InvalidArgumentError: the files are not good to begin with.
    """

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self._warned: object = None
        self._pem = files.read()

    def latest(self) -> Pem:
        """The contents, the same object until they change; a change to what is no good is not taken."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._take(stamp)
            return self._pem

    def _take(self, stamp: tuple[object, ...]) -> None:
        try:
            pem = self._files.read()
        except InvalidArgumentError as error:
            # The stamp stays the old one: a file that is being written is looked at again next time.
            if stamp != self._warned:
                logger.warning("changed TLS files are not used", extra={"reason": error.message})
                self._warned = stamp
            return
        self._stamp, self._warned = stamp, None
        if pem != self._pem:
            logger.info("TLS files changed", extra={"files": str(self._files)})
            self._pem = pem


class OutgoingTls:
    """Credentials of the calls a service makes.

    Args:
        files: authorities of the services it calls, and its own certificate.
        server_name: name their certificates must carry; empty: that of the address.
    """

    def __init__(self, files: PemFiles, server_name: str = "") -> None:
        self.server_name = server_name
        self._watch = PemWatch(files)

    def latest(self) -> Pem:
        """What to connect with now; the same object until it changes."""
        return self._watch.latest()


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Credentials of a client; without authorities those that gRPC trusts by itself."""
    return grpc.ssl_channel_credentials(pem.authorities, pem.private_key, pem.certificate)


def server_credentials(files: PemFiles) -> grpc.ServerCredentials:
    """Credentials of a server; each new connection gets the newest good certificate.

    Args:
        files: `authorities` given: callers must show a certificate signed by one of them.

    Raises:
        InvalidArgumentError: the files are no good.
    """
    watch = PemWatch(files)

    def configuration() -> grpc.ServerCertificateConfiguration:
        pem = watch.latest()
        assert pem.private_key is not None
        assert pem.certificate is not None
        pairs = [(pem.private_key, pem.certificate)]
        return grpc.ssl_server_certificate_configuration(pairs, pem.authorities)

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=files.authorities is not None
    )
