"""What kind of drafter a config.json is of, and which family runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUNS: Mapping[str, str] = {
    "dflash": "z-lab's DFlashDraftModel, speculators' dflash and transformers' muse_glimmer_assistant",
    "dflash2": "z-lab's DFlash2DraftModel and speculators' dflash2",
    "dspark": "DeepSpec's Qwen3DSparkModel and speculators' dspark",
    "eagle3": "speculators' eagle3 and the EAGLE-3 heads of its authors",
    "mtp": "gemma4_assistant and gemma4_unified_assistant",
    "ngram-lm": "tables that `specdec train ngram-lm` has counted",
    "causal-lm": "any causal LM with the target's vocabulary",
}
"""What each family that has checkpoints runs."""
MOST_LAYERS = 10_000
"""No target has more: what a config names beyond it is a mistake."""
_CLASSES = {"DFlashDraftModel": "dflash", "DFlash2DraftModel": "dflash2", "Qwen3DSparkModel": "dspark"}
_TYPES = {
    "gemma4_assistant": "mtp",
    "gemma4_unified_assistant": "mtp",
    "muse_glimmer_assistant": "dflash",
    "specdec_ngram_lm": "ngram-lm",
}


def kind_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a checkpoint is called, and the family that runs it; empty: none does."""
    if kind := config.get("speculators_model_type"):
        return f"speculators' {kind}", kind if str(kind) in RUNS and kind != "mtp" else ""
    model_type, classes = str(config.get("model_type", "")), config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name in _CLASSES or model_type in _TYPES:
        return (name, _CLASSES[name]) if name in _CLASSES else (model_type, _TYPES[model_type])
    if "draft_vocab_size" in config:
        return "an EAGLE-3 head", "eagle3"
    if "dflash_config" in config:
        return "a DFlash drafter", "dflash"
    called = name or model_type or "nothing that says what it is"
    return called, "causal-lm" if name.endswith("ForCausalLM") else ""


def context_length(config: Mapping[str, Any]) -> int:
    """Return the longest text that a drafter was made for, tokens; 0: its config does not say.

    Raises:
        TypeError, ValueError: it is no number.
    """
    own = config.get("transformer_layer_config") or config.get("text_config") or config
    stated = int(own.get("max_position_embeddings") or 0)
    rotary = own.get("rope_parameters") or own.get("rope_scaling") or {}
    # Some configs state the length before the rotary embedding was scaled.
    scaled = int(float(rotary.get("factor") or 0) * int(rotary.get("original_max_position_embeddings") or 0))
    return max(stated, scaled) if stated > 0 else 0


def why_other(config: Mapping[str, Any], family: str) -> str:
    """Say in a sentence that a checkpoint is not of a family, what it is, and what runs it."""
    called, other = kind_of(config)
    if other and other != family:
        return f"it holds {called}; write --drafter {other}:MODEL."
    return f"it holds {called}, which no family runs here; {family} runs {RUNS[family]}."
