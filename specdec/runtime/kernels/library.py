"""The shared library of the kernels, which is built when the package is installed."""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # first: the library uses torch's threads

logger = logging.getLogger(__name__)

_VERSION = 3
"""That of the functions' parameters in the C files."""
_ARGUMENTS = {
    "norm": [*[c_void_p] * 3, *[c_int64] * 2, c_float],
    "add_norm": [*[c_void_p] * 6, *[c_int64] * 2, *[c_float] * 2],
    "turn": [*[c_void_p] * 6, *[c_int64] * 6, c_float],
    "store": [*[c_void_p] * 5, *[c_int64] * 5],
    "gated": [*[c_void_p] * 2, *[c_int64] * 3],
    "arg_max": [*[c_void_p] * 2, *[c_int64] * 2],
    "move": [*[c_void_p] * 2, c_int64, *[c_void_p] * 2, c_int64, c_void_p],
    "attend": [c_void_p],
    "multiply": [*[c_void_p] * 4, *[c_int64] * 6],
}
_LONG = {"attend", "multiply"}
"""Functions that let other threads of the interpreter run meanwhile; the others take microseconds."""


def load() -> Any:
    """Return the library; None: it was not built, or cannot be used."""
    path = Path(__file__).with_name(f"_kernels{EXTENSION_SUFFIXES[0]}")
    if path.is_file():
        try:
            keeping, yielding = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
            if c_int32.in_dll(keeping, "kernels_version").value != _VERSION:
                raise OSError("it was built from other sources; install the package once more")
            library = SimpleNamespace()
            for name, arguments in _ARGUMENTS.items():
                function = getattr(yielding if name in _LONG else keeping, name)
                function.argtypes, function.restype = arguments, None
                setattr(library, name, function)
        except (OSError, AttributeError, ValueError) as error:  # of another machine, or of other sources
            logger.warning("%s cannot be used, so passes take longer: %s", path, error)
        else:
            return library
    return None


LIBRARY = load()


def are_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are there, and compute with tensors of this type and device."""
    return LIBRARY is not None and dtype is torch.bfloat16 and device.type == "cpu"


@cache
def warn_if_missing() -> None:
    """Say once, for a model that the kernels would be used for, that they are not there."""
    if LIBRARY is None:
        logger.warning(
            "the kernels for CPUs were not built when this package was installed, so passes take longer: "
            "install a C compiler (Debian: gcc and libc6-dev), then the package once more"
        )
