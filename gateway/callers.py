"""Who may call a gateway, by bearer tokens in a file, and what each caller may ask for."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import importlib
import logging
import re
import time
import tomllib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gateway.config import GatewayConfig
from specdec.contract.bounds import MAX_NUMBER
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError, UnauthenticatedError
from specdec.service.auth import CALLER, Authenticator, Caller, Limits

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEME = "bearer "
_MINUTE_S = 60.0
_REFUSAL = "This gateway wants a valid token: send it as `authorization: Bearer TOKEN` ($SPECDEC_TOKEN)."


@dataclass(frozen=True, slots=True)
class _Entry:
    caller: Caller
    digest: bytes
    expires: dt.datetime | None


class TokenFile:
    """Callers by the SHA-256 of their tokens, from a TOML file; an invalid change is not taken.

    Raises:
        InvalidArgumentError: the file is invalid to begin with.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._now()
        self._entries = _read(path)

    async def authenticate(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Return the caller whose token the call has. The time does not tell how nearly right a token is.

        Raises:
            UnauthenticatedError: the call has no token, or nobody's, or an expired token.
        """
        self._follow()
        header = str(metadata.get("authorization", ""))
        token = header[len(_SCHEME) :] if header[: len(_SCHEME)].lower() == _SCHEME else ""
        digest = hashlib.sha256(token.encode()).digest()
        found = [entry for entry in self._entries if hmac.compare_digest(entry.digest, digest)]
        now = dt.datetime.now(dt.UTC)
        valid = [entry for entry in found if entry.expires is None or now < entry.expires]
        if not token or not valid:
            raise UnauthenticatedError(_REFUSAL)
        return valid[0].caller

    def _now(self) -> object:
        status = self._path.stat() if self._path.exists() else None
        return status and (status.st_ino, status.st_mtime_ns, status.st_size)

    def _follow(self) -> None:
        stamp = self._now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = _read(self._path)
            logger.info("tokens changed", extra={"num_tokens": len(self._entries)})
        except InvalidArgumentError as error:
            logger.warning("a changed token file is not used", extra={"reason": error.message})


def _read(path: Path) -> list[_Entry]:
    if not path.is_file():
        raise InvalidArgumentError(
            f"{path} does not exist; `specdec token NAME >> {path}` begins it.", field="auth_tokens"
        )
    try:
        tables = tomllib.loads(path.read_text()).get("tokens", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as TOML: {error}", field="auth_tokens") from error
    try:
        return [_entry(table) for table in tables]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path} has a [[tokens]] table that is not as `specdec token NAME` makes them: {error}",
            field="auth_tokens",
        ) from error


def _entry(table: Mapping[str, Any]) -> _Entry:
    names = {limit.name for limit in fields(Limits)}
    unknown = table.keys() - names - {"name", "sha256", "expires"}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is not a field of a token")
    limits = {name: table[name] for name in names & table.keys()}
    for name, value in limits.items():
        if type(value) is not int or not 1 <= value <= MAX_NUMBER:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {MAX_NUMBER}")
    if not _SHA256.fullmatch(table["sha256"]):
        raise ValueError("sha256 must be 64 hexadecimal digits")
    expires = table.get("expires")
    if expires is not None and (not isinstance(expires, dt.datetime) or expires.tzinfo is None):
        raise ValueError("expires must be a time with its offset, such as 2027-01-31T00:00:00Z")
    if not isinstance(table["name"], str) or not table["name"]:
        raise ValueError("name must be some text")
    return _Entry(Caller(table["name"], Limits(**limits)), bytes.fromhex(table["sha256"]), expires)


def make_authenticator(config: GatewayConfig) -> Authenticator | None:
    """Return the authenticator that the configuration asks for; None: everyone may call.

    Raises:
        InvalidArgumentError: the file is invalid, or there is no such authenticator.
    """
    if config.auth_tokens:
        return TokenFile(Path(config.auth_tokens))
    if not config.authenticator:
        return None
    module, _, name = config.authenticator.partition(":")
    try:
        made: Authenticator = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"--authenticator {config.authenticator!r} is not MODULE:NAME of a callable without arguments: "
            f"{error}",
            field="authenticator",
        ) from error
    return made


class CallerLimits:
    """Counts what each caller does, by the caller's name, over all its tokens.

    Args:
        retry_after_s: says in how many seconds a request of a caller should end, by the caller's name.
    """

    def __init__(self, retry_after_s: Callable[[str], float]) -> None:
        self._retry_after_s = retry_after_s
        self._running: Counter[str] = Counter()
        self._begun: dict[str, deque[float]] = {}
        """When the requests of the last minute began, by caller."""

    @property
    def num_known(self) -> int:
        """How many callers something is kept of."""
        return len(self._running.keys() | self._begun.keys())

    @contextmanager
    def admitted(self, wanted: int | None, default: int) -> Iterator[int]:
        """Stand around a caller's generation; the value is how many tokens it may emit.

        Args:
            wanted: max_new_tokens of the request; None: the request does not say and gets `default`, or
                what its caller may have if that is less.

        Raises:
            InvalidArgumentError: it asks for more tokens than its caller may have.
            ResourceExhaustedError: the caller has too many requests, now or within a minute.
        """
        caller = CALLER.get()
        if caller is None:
            yield default if wanted is None else wanted
            return
        max_new_tokens = _settle_length(wanted, caller.limits.max_new_tokens, default)
        self._require_room(caller)
        self._running[caller.name] += 1
        try:
            yield max_new_tokens
        finally:
            self._running[caller.name] -= 1
            if not self._running[caller.name]:
                del self._running[caller.name]

    def _require_room(self, caller: Caller) -> None:
        limits, now = caller.limits, time.monotonic()
        self._forget_until(now - _MINUTE_S)
        begun: Sequence[float] = self._begun.get(caller.name, ())
        limit = limits.max_concurrent_requests
        if limit is not None and self._running[caller.name] >= limit:
            raise ResourceExhaustedError(
                f"This token's {limit} requests at a time are under way; try again later.",
                reason="TOO_MANY_REQUESTS_OF_CALLER",
                retry_after_s=self._retry_after_s(caller.name),
            )
        if limits.requests_per_minute is not None and len(begun) >= limits.requests_per_minute:
            raise ResourceExhaustedError(
                f"This token's {limits.requests_per_minute} requests a minute are used up; try again later.",
                reason="TOO_MANY_REQUESTS_A_MINUTE",
                retry_after_s=round(begun[0] + _MINUTE_S - now, 3),
            )
        if limits.requests_per_minute is not None:
            self._begun.setdefault(caller.name, deque()).append(now)

    def _forget_until(self, then: float) -> None:
        for name, begun in list(self._begun.items()):
            while begun and begun[0] <= then:
                begun.popleft()
            if not begun:
                del self._begun[name]


def _settle_length(wanted: int | None, limit: int | None, default: int) -> int:
    if wanted is None:
        return default if limit is None else min(limit, default)
    if limit is not None and wanted > limit:
        raise InvalidArgumentError(
            f"max_new_tokens is {wanted}; this token may have {limit}.", field="max_new_tokens"
        )
    return wanted


def require_length(max_new_tokens: int | None, most: int) -> None:
    """Refuse an answer that is longer than any may be.

    Raises:
        InvalidArgumentError: it is.
    """
    if max_new_tokens is not None and max_new_tokens > most:
        raise InvalidArgumentError(
            f"max_new_tokens is {max_new_tokens}; an answer of this gateway has at most {most} tokens.",
            field="max_new_tokens",
        )
