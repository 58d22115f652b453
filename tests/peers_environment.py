"""Whether the environment of the peer openvino was made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from specdec.bench.peers.openvino_export import MAKE_TARGET

NEEDS_OPENVINO = pytest.mark.skipif(
    not (Path(sys.prefix) / "peers" / "installed").is_file(),
    reason=f"the environment of the peer openvino was not made; run `make {MAKE_TARGET}`",
)
