"""DSpark checkpoints, as vLLM's `speculators` and its authors write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import MuseGlimmerAssistantConfig

from drafter_service.drafters.dflash.checkpoint import Kind, Parts, Source
from drafter_service.drafters.dflash.config import DFlashSettings, read_speculators, read_z_lab
from drafter_service.drafters.dspark.bias import KINDS, TokenBias
from drafter_service.drafters.kinds import RUNS, kind_of, why_other
from drafter_service.drafters.weights import check_rows, take_weights
from specdec.contract.errors import InvalidArgumentError

_GEMMA = "Gemma4DSparkModel"
_DEFAULT_RANK = 256


def read_config(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    """Return the decoder's shape and the other settings of a config.json.

    Raises:
        InvalidArgumentError: the checkpoint is of another kind, or a value is missing or not supported.
    """
    if (kind := config.get("markov_head_type", "vanilla")) not in KINDS:
        raise InvalidArgumentError(f"its markov_head_type is {kind!r}; supported are {', '.join(KINDS)}.")
    if config.get("speculators_model_type") == "dspark":
        return read_speculators({"sample_from_anchor": True, **config})
    if kind_of(config)[1] == "dspark":
        decoder, settings = read_z_lab(config)
        return decoder, replace(settings, sample_from_anchor=True)
    if kind_of(config)[0] == _GEMMA:
        raise InvalidArgumentError(
            f"it holds {_GEMMA}, whose decoder layers are Gemma 4's; dspark runs {RUNS['dspark']}, whose "
            "layers are Qwen 3's."
        )
    raise InvalidArgumentError(why_other(config, "dspark"))


def take_parts(source: Source) -> Parts:
    """Take the bias and the confidence head out of a checkpoint's weights.

    Raises:
        KeyError, ValueError: weights are missing, or do not fit.
    """
    config, rank = source.config, int(source.config.get("markov_rank", _DEFAULT_RANK))
    weights = take_weights(source.weights, "markov_head.")
    confidence = take_weights(source.weights, "confidence_head.")
    if not rank:
        raise ValueError(
            "it has no bias by the token before (markov_rank 0); a plain DFlash drafter has none"
        )
    kind = config.get("markov_head_type", "vanilla")
    if not config.get("enable_confidence_head", True):
        confidence = {}
    bias = TokenBias.of(kind, weights, confidence, (rank, source.hidden_size), source.draft_order)
    check_rows("markov_w1", bias.tokens, source.settings.vocab_size)
    return Parts(bias)


DSPARK = Kind("dspark", read_config, take_parts)
