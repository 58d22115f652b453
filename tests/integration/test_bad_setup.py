"""What an operator can get wrong - models, ports, a damaged cache - is refused at start, with the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    LlamaModel,
    T5Config,
)

from drafter_service.config import DrafterConfig
from drafter_service.families import load_drafters
from drafter_service.server import DrafterServer
from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from specdec.contract.errors import InvalidArgumentError, NotFoundError, SpecdecError, UnavailableError
from specdec.models.embedded import cache_directory, find_damage, prepare_default_model
from specdec.models.files import resolve_model
from specdec.service.exporters import make_telemetry
from tests.raw_streams import output_of
from tests.systems import running_verifier
from tests.tiny_models import VOCAB_SIZE, byte_tokenizer
from verifier_service.config import VerifierConfig
from verifier_service.server import VerifierServer

Spoil = Callable[[Path], object]


def replace_model(make: Callable[[], torch.nn.Module]) -> Spoil:
    """Put another kind of model in the folder."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        make().save_pretrained(folder)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(folder)

    return spoil


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Rewrite the folder's weights."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return spoil


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BERT = BertConfig(
    vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
T5 = T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
UP = "model.layers.1.mlp.up_proj.weight"

SPOILED: dict[str, tuple[Spoil, type[SpecdecError], str]] = {
    "no folder": (shutil.rmtree, NotFoundError, "neither a folder nor a hub id"),
    "no config": (lambda f: (f / "config.json").unlink(), NotFoundError, "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), InvalidArgumentError, "config.json"),
    "unknown architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "abacus"}'),
        InvalidArgumentError,
        "abacus",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InvalidArgumentError, "cannot be loaded"),
    "truncated weights": (truncate_weights, InvalidArgumentError, "cannot be loaded"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_text("not weights"),
        InvalidArgumentError,
        "cannot be loaded",
    ),
    "a weight missing": (change_weights(lambda w: w.pop(UP)), InvalidArgumentError, UP),
    "a weight misshapen": (
        change_weights(lambda w: w.update({UP: torch.zeros(3, 3)})),
        InvalidArgumentError,
        "cannot be loaded",
    ),
    "not a number": (change_weights(lambda w: w[UP].fill_(torch.nan)), InvalidArgumentError, "nan"),
    "T5": (
        replace_model(lambda: AutoModelForSeq2SeqLM.from_config(T5)),
        InvalidArgumentError,
        "not a causal LM",
    ),
    "BERT": (
        replace_model(lambda: AutoModel.from_config(BERT)),
        InvalidArgumentError,
        "another kind of model",
    ),
    "BERT with a head": (
        replace_model(lambda: AutoModelForMaskedLM.from_config(BERT)),
        InvalidArgumentError,
        "does not support",
    ),
    "tokenizer damaged": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        InvalidArgumentError,
        "tokenizer.json cannot be parsed",
    ),
}


async def load_verifier(model: Path, **options: Any) -> None:
    """Load a verifier; it is expected to fail."""
    config = VerifierConfig(model=str(model), **({"dtype": "float32", "kv_cache_mib": 1.0} | options))
    server = VerifierServer(config, make_telemetry("verifier"))
    try:
        await server.load()
    finally:
        await server.close()


@pytest.mark.parametrize("name", SPOILED)
async def test_a_model_that_cannot_be_served_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    spoil, error, fragment = SPOILED[name]
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(SpecdecError) as raised:
        await load_verifier(folder)
    assert raised.type is error, raised.value
    assert fragment in raised.value.message
    with pytest.raises(error):
        load_drafters(DrafterConfig(drafter=(f"causal-lm:{folder}",), dtype="float32", kv_cache_mib=1.0))


async def test_a_model_without_a_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    LlamaModel.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"lm_head\.weight") as raised:
        await load_verifier(tmp_path)
    assert raised.value.field == "model"


def test_a_file_and_a_nonsense_name_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for model in (str(tmp_path / "weights.bin"), "no such model", "a/b/c"):
        with pytest.raises(NotFoundError, match=r"config\.json"):
            resolve_model(model)


async def test_a_pool_without_room_for_a_block_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="raise --kv-cache-mib") as raised:
        await load_verifier(tiny_llama, kv_cache_mib=0.001)
    assert raised.value.field == "kv_cache_mib"


async def test_a_device_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    for device in ("cuda:99", "hpu", "meta", "fast"):
        with pytest.raises(InvalidArgumentError, match=f"'{device}'") as raised:
            await load_verifier(tiny_llama, device=device)
        assert raised.value.field == "device"


async def test_a_port_in_use_is_refused_and_its_owner_unharmed(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (address, _):
        servers = [
            VerifierServer(VerifierConfig(listen=address, model=str(tiny_llama)), make_telemetry("v")),
            DrafterServer(DrafterConfig(listen=address), make_telemetry("d")),
            GatewayServer(GatewayConfig(listen=address, tokenizer=str(tiny_llama)), make_telemetry("g")),
        ]
        for server in servers:
            with pytest.raises(InvalidArgumentError, match="--listen") as raised:
                await server.host.start()
            assert raised.value.reason == "ADDRESS_IN_USE"
            assert address in raised.value.message
            await server.close()
        assert len(await output_of(address, [5, 6, 7])) == 8


# The embedded model's cache


@pytest.fixture
def damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache whose model cannot be loaded, without an index to fetch another from."""
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = cache_directory() / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half a mod")
    return folder


@pytest.mark.parametrize(
    ("manifest", "damage"),
    [
        (None, "manifest.json"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        (json.dumps({"format": 0, "wheel_sha256": "", "files": {}}), "made by another version"),
    ],
)
def test_a_damaged_cache_is_found_and_not_used(
    manifest: str | None, damage: str, damaged_cache: Path
) -> None:
    if manifest is not None:
        (damaged_cache / "manifest.json").write_text(manifest)
    assert damage in find_damage(damaged_cache)


def test_a_damaged_cache_that_cannot_be_made_again_says_what_to_do(damaged_cache: Path) -> None:
    reports: list[str] = []
    with pytest.raises(UnavailableError, match="Check that pip can reach its index") as raised:
        prepare_default_model(reports.append)
    assert "another model" in raised.value.message
    assert "is damaged" in reports[0]
    left = {path.name for path in damaged_cache.parent.iterdir()}
    assert left == {"smollm2-135m-instruct.lock"}, "nothing half-made may be left"


@pytest.mark.default_model
def test_one_changed_bit_of_the_embedded_model_is_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepare_default_model(), tmp_path / "copy"))
    assert find_damage(folder) == ""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(100_000_000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert find_damage(folder) == "model.safetensors was changed"
    (folder / "model.safetensors").unlink()
    assert "FileNotFoundError" in find_damage(folder)
