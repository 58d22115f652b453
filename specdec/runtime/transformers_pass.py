"""A pass through a model's own code in transformers, its attention replaced by that over the KV pool.

For models that the decoder written out does not know. All sessions' new tokens are a batch of one with their
own position ids; `paged_attention` lets each session see its own keys and values only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.capture import AFTER_NORM, HiddenCapture
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.model_pass import Pass
from specdec.runtime.paged_attention import ATTENTION_NAME, PoolCache
from specdec.runtime.prepack import prepack_linears, stable_head

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NUM_PROBE_TOKENS = 8


class TransformersPass:
    """Runs passes of a model whose attention is that over the pool from now on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._capture: HiddenCapture | None = None
        head = model.get_output_embeddings()
        prepack_linears(model, keep=head)
        model.set_output_embeddings(stable_head(head))
        self.expected, self.shapes = probe(model)
        model.set_attn_implementation(ATTENTION_NAME)
        decoder: nn.Module = model.get_decoder()
        for index, layer in enumerate(getattr(decoder, "layers", ())):
            layer.register_forward_hook(self._capturing(index))
        decoder.register_forward_hook(self._capturing(AFTER_NORM))

    def _capturing(self, layer: int) -> Any:
        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._capture is not None:
                self._capture(layer, _hidden_of(output)[0])

        return store

    def __call__(self, current: Pass, pool: KvPool, capture: HiddenCapture) -> Tensor:
        """Run a pass and return the logits of the rows that it wants [num_logits, vocab_size]."""
        self._capture = capture
        output = self._model(
            input_ids=current.token_ids[None],
            position_ids=current.positions[None],
            past_key_values=PoolCache(pool, current),
            use_cache=True,
            logits_to_keep=current.logit_rows,
        )
        logits: Tensor = output.logits[0]
        return logits

    def prepare(self, current: Pass) -> None:
        """Do nothing: layers plan their attention when they come to it."""


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse models whose own code does not work this way.

    Raises:
        InvalidArgumentError: the model is one.
    """
    name = type(model).__name__
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    strange = layer_types - _SUPPORTED_LAYER_TYPES
    if strange:
        raise InvalidArgumentError(
            f"{name} has layers of type {', '.join(sorted(strange))}; supported are "
            f"{', '.join(sorted(_SUPPORTED_LAYER_TYPES))}.",
            reason="UNSUPPORTED_MODEL",
        )
    if not model._supports_attention_backend:
        raise InvalidArgumentError(
            f"{name} does not take its attention from transformers' AttentionInterface, which the KV pool "
            "needs.",
            reason="UNSUPPORTED_MODEL",
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InvalidArgumentError(
            f"{name}.forward does not take logits_to_keep: it is not a causal LM that this service can run.",
            reason="UNSUPPORTED_MODEL",
        )


def _hidden_of(output: Any) -> Tensor:
    """Hidden states [1, tokens, hidden_size] of what a layer or a decoder returns."""
    if isinstance(output, Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    result: Tensor = output[0] if hidden is None else hidden
    return result


class _ShapeRecorder(Cache):
    """Notes the geometry of every layer that stores KV of its own."""

    def __init__(self, windows: Mapping[int, int]) -> None:
        super().__init__(layers=[])
        self._windows = windows
        self.shapes: dict[int, KvShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Record and pass through: a first chunk attends over itself."""
        self.shapes[layer_idx] = KvShape(
            key_states.shape[1],
            key_states.shape[-1],
            value_states.shape[-1],
            self._windows.get(layer_idx, 0),
        )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is cached."""
        return 0


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[Tensor, dict[int, KvShape]]:
    """Logits [tokens, vocab_size] of the probe by the model's own attention, and each layer's KV geometry.

    The geometry is observed because configurations name it in too many ways.
    """
    recorder = _ShapeRecorder(_windows(model))
    model.set_attn_implementation("eager")
    probe = probe_tokens(model.get_output_embeddings().weight.shape[0])
    token_ids = torch.tensor([probe], device=model.device)
    positions = torch.arange(len(probe), device=model.device)[None]
    output = model(input_ids=token_ids, position_ids=positions, past_key_values=recorder, use_cache=True)
    return output.logits[0].float(), recorder.shapes


def _windows(model: PreTrainedModel) -> dict[int, int]:
    """Return the sliding windows that layers hand to their attention, by layer; 0: none."""
    return {
        module.layer_idx: module.sliding_window or 0
        for module in model.get_decoder().modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "sliding_window")
    }


def probe_tokens(vocab_size: int, num_tokens: int = _NUM_PROBE_TOKENS) -> list[int]:
    """Token ids spread over the vocabulary."""
    return [(17 + 7919 * index) % vocab_size for index in range(num_tokens)]
