"""A system whose drafters cannot map the target's state: they stream it, and draft all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from specdec.client import Client, GenerateOptions
from specdec.local.launcher import LocalSystem
from tests.small_memory import SmallMemory
from tests.tiny_dflash import save_tiny_dflash

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PLAIN = GenerateOptions(max_new_tokens=16, ignore_eos=True, method="none")
DRAFTED = GenerateOptions(max_new_tokens=16, ignore_eos=True, method="dflash", draft_depth=4)
ENV = {"OMP_NUM_THREADS": "1"}


def check_drafts(gateway: str) -> None:
    """Check that a drafter that reads the target's state drafts in every round, and changes no token."""
    with Client(gateway, timeout_s=60) as client:
        plain, drafted = client.generate(PROMPT, PLAIN), client.generate(PROMPT, DRAFTED)
    assert drafted.speculation.fallback_reason == ""
    assert drafted.speculation.num_fallback_rounds == 0
    assert drafted.speculation.num_draft_tokens > 0
    assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize("why", ["directories apart", pytest.param("told to stream", marks=pytest.mark.slow)])
def test_drafters_of_a_local_system_draft_from_a_stream(why: str, tiny_llama: Path, tmp_path: Path) -> None:
    arguments: Mapping[str, Sequence[str]]
    if why == "told to stream":
        arguments = dict.fromkeys(("verifier", "drafter"), ("--target-state", "stream"))
    else:
        arguments = {name: ("--shared-dir", str(tmp_path / name)) for name in ("verifier", "drafter")}
        for name in arguments:
            (tmp_path / name).mkdir()
    drafter = f"dflash:{save_tiny_dflash(tmp_path / 'dflash')}"
    with LocalSystem(
        str(tiny_llama), dtype="float32", drafters=[drafter], extra_args=arguments, env=ENV
    ) as system:
        check_drafts(system.gateway)


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[SmallMemory]:
    memory = SmallMemory(tmp_path / "small")
    yield memory
    memory.unmount()


def test_up_says_what_room_was_wanted_and_drafts(
    small_memory: SmallMemory, tiny_llama: Path, tmp_path: Path
) -> None:
    small_memory.mount(num_kib=64)
    services = ("VERIFIER", "DRAFTER")
    settings = {f"SPECDEC_{name}_SHARED_DIR": str(small_memory.path) for name in services}
    env = os.environ | ENV | settings | {"SPECDEC_STATE_DIR": str(tmp_path / "state")}

    def specdec(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "specdec", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)

    drafter = f"dflash:{save_tiny_dflash(tmp_path / 'dflash')}"
    try:
        model = ("--model", str(tiny_llama), "--dtype", "float32", "--kv-cache-mib", "4")
        started = specdec("up", "--detach", *model, "--drafter", drafter)
        assert f"warning: verifier: {small_memory.path}" in started.stderr
        assert "has no room for 4 MiB" in started.stderr
        assert "MiB for each layer of hidden states" in started.stderr
        assert "--shm-size" in started.stderr
        assert "Ready." in started.stderr
        check_drafts(started.stdout.split()[1])
    finally:
        specdec("down")
