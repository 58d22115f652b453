"""The certificates of services and clients. They are checked when read, and read again when files change."""

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
"""How many times files that keep changing are read before the attempt fails."""


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of PEM files, whose certificate and key are a pair. None: the file is not configured."""

    authorities: bytes | None = None
    private_key: bytes | None = None
    certificate: bytes | None = None


@dataclass(frozen=True, slots=True)
class PemFiles:
    """PEM files that are used together."""

    authorities: Path | None = None
    """The authorities that may have signed the peer's certificate."""
    private_key: Path | None = None
    certificate: Path | None = None
    """Our own certificate, followed by the certificates between it and an authority."""

    def read(self) -> Pem:
        """Read all files as they are at one moment.

        Raises:
            InvalidArgumentError: a file is missing or is not PEM, or key and certificate do not match.
        """
        if (self.private_key is None) != (self.certificate is None):
            given, missing = ("certificate", "private key")[:: 1 if self.certificate else -1]
            raise _refused(f"A TLS {given} is given without its {missing}; give both or neither.")
        for _ in range(_NUM_TRIES):
            pem = self._contents()
            self._check(pem)
            # The check reads the files itself. It saw these contents if they are the same before and after.
            if pem == self._contents():
                return pem
        raise _refused(f"The TLS files {self} keep changing while they are read; replace each in one step.")

    def stamp(self) -> tuple[object, ...]:
        """Return a value that changes whenever a file is written or replaced."""
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
        raise _refused(f"{path} does not hold PEM certificate authorities ({error}).") from error


def _check_pair(certificate: Path, private_key: Path) -> None:
    def no_password() -> NoReturn:
        raise ValueError("the key is encrypted")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, no_password)
    except (ssl.SSLError, ValueError) as error:
        raise _refused(
            f"{certificate} and {private_key} are not a PEM certificate and its plain private key ({error})."
        ) from error
    except OSError as error:
        raise _refused(f"A TLS file cannot be read: {error}") from error


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="tls")


class PemWatch:
    """The newest valid contents of PEM files. Any thread may use it.

    Raises:
        InvalidArgumentError: the files are not valid at the start.
    """

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self._warned: object = None
        self._pem = files.read()

    def latest(self) -> Pem:
        """Return the contents, as the same object until they change. Invalid changes are ignored."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._take(stamp)
            return self._pem

    def _take(self, stamp: tuple[object, ...]) -> None:
        try:
            pem = self._files.read()
        except InvalidArgumentError as error:
            # The old stamp is kept, so that a file that is still being written is read again next time.
            if stamp != self._warned:
                logger.warning("changed TLS files are not used", extra={"reason": error.message})
                self._warned = stamp
            return
        self._stamp, self._warned = stamp, None
        if pem != self._pem:
            logger.info("TLS files changed", extra={"files": str(self._files)})
            self._pem = pem


class OutgoingTls:
    """The credentials of the calls that a service makes.

    Args:
        files: authorities of the called services, and the calling service's own certificate.
        server_name: name that the called services' certificates must carry; empty: the address's name.
    """

    def __init__(self, files: PemFiles, server_name: str = "") -> None:
        self.server_name = server_name
        self._watch = PemWatch(files)

    def latest(self) -> Pem:
        """Return the contents to connect with now, as the same object until they change."""
        return self._watch.latest()


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Return the credentials of a client. Without authorities, gRPC uses those that it trusts by default."""
    return grpc.ssl_channel_credentials(pem.authorities, pem.private_key, pem.certificate)


def server_credentials(files: PemFiles) -> grpc.ServerCredentials:
    """Return the credentials of a server. Each new connection gets the newest valid certificate.

    Args:
        files: the server's certificate and key. If `authorities` is set, callers must show a certificate that
            one of the authorities signed.

    Raises:
        InvalidArgumentError: the files are not valid.
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


class HttpTls:
    """TLS of an HTTP server. Each new connection gets the newest valid certificate.

    Args:
        files: as those of `server_credentials`.

    Raises:
        InvalidArgumentError: the files are not valid.
    """

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._watch = PemWatch(files)
        self._pem = self._watch.latest()
        self.context = self._newest = self._load()
        """What to serve with. It hands each connection on to a context with the newest files."""
        self.context.sni_callback = self._choose

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        assert self._files.certificate is not None
        context.load_cert_chain(self._files.certificate, self._files.private_key)
        if self._files.authorities:
            context.load_verify_locations(self._files.authorities)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        pem = self._watch.latest()
        if pem is not self._pem:
            try:
                self._newest, self._pem = self._load(), pem
            except (OSError, ssl.SSLError) as error:  # they change at this moment; the next connection tries
                logger.warning("changed TLS files are not used", extra={"reason": type(error).__name__})
        connection.context = self._newest
