"""Models with random weights whose target state has the size of a large model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models

_VOCAB_SIZE = 512


@contextmanager
def prepared_model(model: str) -> Iterator[str]:
    """Yield a model to serve: one of `GEOMETRIES` as a folder that exists within the block, others as they
    are."""
    if model not in GEOMETRIES:
        yield model
        return
    with TemporaryDirectory(prefix="specdec-") as parent:
        folder = Path(parent) / model  # peers know the model by the folder's name
        _save(GEOMETRIES[model](), folder)
        yield str(folder)


def _gemma4_31b() -> Any:
    """Return a config with the state of Gemma 4 31B and little else.

    The size of its state comes from a hidden size of 5376, sliding layers with 16 KV heads of 256, and full
    layers with 4 heads of 512. This config has one group of its layers, a tiny MLP and half the query heads.
    """
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        hidden_size=5376,
        num_key_value_heads=16,
        head_dim=256,
        num_global_key_value_heads=4,
        global_head_dim=512,
        attention_k_eq_v=True,
        layer_types=[*["sliding_attention"] * 5, "full_attention"],
        sliding_window=1024,
        max_position_embeddings=262_144,
        num_hidden_layers=6,
        num_attention_heads=16,
        intermediate_size=64,
        vocab_size=_VOCAB_SIZE,
        vocab_size_per_layer_input=_VOCAB_SIZE,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=False,
    )


GEOMETRIES: Mapping[str, Callable[[], Any]] = {"gemma4-31b-geometry": _gemma4_31b}
"""Functions that return a config, by the name of the model; each model has 1.1 GB in bfloat16."""


def _save(config: Any, folder: Path) -> None:
    """Write a model with random weights, and the tokenizer that a gateway needs."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    vocabulary = {f"<{token_id}>": token_id for token_id in range(config.vocab_size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")).save(str(folder / "tokenizer.json"))
