"""What an installation without the extra `models` says when something needs a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.models.extra import MODULES

REPOSITORY = Path(__file__).resolve().parents[2]
VERIFIER = ("verifier_service", "--listen", "127.0.0.1:0")
DRAFTER = ("drafter_service", "--listen", "127.0.0.1:0", "--drafter", "causal-lm:MODEL")


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ((*VERIFIER, "--model", "MODEL"), 2),
        (DRAFTER, 2),
        (("specdec", "up"), 1),
        (("specdec", "up", "--detach"), 1),
        (("specdec", "train", "mtp", "--out", "drafter", "--model", "MODEL"), 1),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_needs_models_says_how_to_install_them(
    arguments: tuple[str, ...], exit_code: int, tiny_llama: Path, tmp_path: Path
) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in MODULES)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    result = subprocess.run(
        [sys.executable, "-m", *(part.replace("MODEL", str(tiny_llama)) for part in arguments)],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{REPOSITORY}",
            "SPECDEC_STATE_DIR": str(tmp_path / "state"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == exit_code, output
    assert 'pip install "specdec[models]"' in output.replace('\\"', '"')
    assert "Traceback" not in output
