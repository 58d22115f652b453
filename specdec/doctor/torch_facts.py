"""What torch finds on this machine: python -m specdec.doctor.torch_facts prints it as one JSON object.

It is a program of its own because torch takes seconds to load, and a broken one may end its process.
"""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any


def look() -> dict[str, Any]:
    """Return the version of torch, the GPU that it can use, and whether the kernels in C are there."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        error = _gpu_error()
    from specdec.runtime.kernels.library import LIBRARY

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu_error": error or " ".join(str(warning.message).splitlines()[0] for warning in told),
        "is_gpu_usable": not error,
        "has_kernels": LIBRARY is not None,
    }


def _gpu_error() -> str:
    """Return why torch cannot compute on the GPU; empty: it can."""
    import torch

    if not torch.version.cuda:
        return "this torch was built for CPUs"
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # made for other GPUs, or all of its memory is taken
        return str(error).splitlines()[0]
    return ""


if __name__ == "__main__":
    logging.disable()  # what is logged of the kernels is among the facts
    print(json.dumps(look()))
