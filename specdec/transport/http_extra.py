"""The extra `http` of the package: what serves HTTP, and an error for an installation without it."""

from __future__ import annotations

import importlib.util

from specdec.contract.errors import FailedPreconditionError

MODULES = ("h11", "pydantic", "starlette", "uvicorn")
"""The modules of the extra."""


def has_http_extra() -> bool:
    """Return whether the extra is installed."""
    return not _missing()


def require_http_extra() -> None:
    """Refuse to go on without the extra.

    Raises:
        FailedPreconditionError: a module of the extra is not installed.
    """
    if missing := _missing():
        raise FailedPreconditionError(
            f"To serve HTTP this needs {missing[0]}, which is not installed; install it with "
            '`pip install "specdec[http]"`, or leave --http-listen out.',
            reason="HTTP_EXTRA_MISSING",
        )


def _missing() -> list[str]:
    return [name for name in MODULES if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # what is None in sys.modules is not to be had
        return False
