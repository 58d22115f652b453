"""The extra `models` of the package: what runs models, and an error for an installation without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from specdec.contract.errors import FailedPreconditionError

MODULES = ("torch", "transformers", "safetensors", "numpy", "gguf", "accelerate")
"""The modules of the extra."""


def require_models_extra() -> None:
    """Refuse to go on without the extra, before anything takes time.

    Raises:
        FailedPreconditionError: a module of the extra is not installed.
    """
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


@contextmanager
def models_extra() -> Iterator[None]:
    """Turn a failed import of a module of the extra into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in MODULES:
            raise
        raise _missing(name) from error


def _missing(name: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"To run models this needs {name}, which is not installed; install it with "
        '`pip install "specdec[models]"`.',
        reason="MODELS_EXTRA_MISSING",
    )
