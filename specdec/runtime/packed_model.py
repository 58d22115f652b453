"""A causal LM over the KV pool: the tokens of many sessions in one forward pass.

The dense families run as a decoder written out (`decoder`), once a comparison with the model's own code has
shown that both compute the same. Other models run by their own code in transformers (`transformers_pass`).
All sessions' new tokens are one batch; attention lets each session see its own keys and values only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.attention import Segment
from specdec.runtime.bucket import Bucket, fits
from specdec.runtime.capture import HiddenCapture
from specdec.runtime.decoder.check import compare
from specdec.runtime.decoder.decoder import Decoder
from specdec.runtime.decoder.families import kv_shapes, why_not
from specdec.runtime.kernels.library import warn_if_missing
from specdec.runtime.kv_layout import SlidingLayers
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.memory import StateMemory
from specdec.runtime.model_pass import Pass
from specdec.runtime.transformers_pass import TransformersPass, probe, probe_tokens, refuse_unsupported

logger = logging.getLogger(__name__)

_PROBE_TOLERANCE = {4: 1e-3, 2: 0.2}
"""Largest relative error of the probe's logits, by bytes per element."""
_MOST_ROUNDING = 3.0
"""The same, as a multiple of the error that rounding makes in the model's own code: it grows with depth."""

SPECDEC, TRANSFORMERS = "specdec", "transformers"
"""Whose code computes a pass: the decoder written out, or the model's own."""


@dataclass(frozen=True, slots=True)
class GivingBack:
    """How sessions use a pool that give back what no query sees any more."""

    pass_tokens: int
    """See SlidingLayers."""
    session_tokens: int
    """See SlidingLayers."""


class PackedModel:
    """A causal LM and the KV pool of its sessions."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_budget_bytes: int,
        memory: StateMemory | None = None,
        giving_back: GivingBack | None = None,
    ) -> None:
        """Take `model` over, with a pool of `kv_budget_bytes` in `memory` or in private memory.

        Args:
            giving_back: how sessions use the pool that give back what no query sees; None: they keep all.

        Raises:
            InvalidArgumentError: the model does not work this way, or the budget is less than one block.
        """
        self.model = model.eval()
        refuse_unsupported(model)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        text_config = model.config.get_text_config()
        self.max_length: int = getattr(text_config, "max_position_embeddings", 0) or 0
        num_layers = len(getattr(model.get_decoder(), "layers", ()))
        hidden_size = model.get_input_embeddings().weight.shape[1]
        self.why_transformers = why_not(model)
        """Why the model's own code computes a pass; empty: it does not."""
        self._forward, expected, rounding, shapes = self._take_over(model)
        self._settle_memory()
        self.pool = KvPool(
            shapes,
            budget_bytes=kv_budget_bytes,
            dtype=self.dtype,
            device=self.device,
            memory=memory,
            sliding=self._sliding_layers(shapes, giving_back) if giving_back else None,
        )
        self.capture = HiddenCapture(num_layers, hidden_size, self.pool)
        self.joins_branches = self.device.type != "cpu"
        """Whether branches of a draft tree share calls of torch's attention. On a CPU they would round
        otherwise than apart; on a GPU a pass of another size does so in any case."""
        self.fills_up = self.device.type == "cuda"
        """Whether passes of rounds are filled up to a bucket: on a GPU, where rows cost next to nothing."""
        self._self_test(expected, rounding)

    def _take_over(
        self, model: PreTrainedModel
    ) -> tuple[Decoder | TransformersPass, Tensor, float, dict[int, KvShape]]:
        """Return what runs passes, the probe's logits, their error by rounding, and layers' KV geometry."""
        rounding = 0.0
        if not self.why_transformers:
            expected, _ = probe(model)
            comparison = compare(model)
            self.why_transformers = comparison.finding
            rounding = _relative_error(expected, comparison.logits[: len(expected)])
            if not comparison.finding:
                if self.device.type == "cpu" and self.dtype is torch.bfloat16:
                    warn_if_missing()
                shapes = kv_shapes(model.get_decoder())
                return Decoder.of(model), expected, rounding, shapes
            logger.warning(
                "the model runs by its own code in transformers, which is slower: %s of the decoder written "
                "out for its family",
                comparison.finding,
            )
        by_transformers = TransformersPass(model)
        return by_transformers, by_transformers.expected, rounding, by_transformers.shapes

    def _sliding_layers(self, shapes: Mapping[int, KvShape], giving_back: GivingBack) -> SlidingLayers | None:
        """Return the layers that need the last positions only, if others need all of them."""
        kinds = attention_types(self.model, shapes)
        windows = {layer: shape.window for layer, shape in shapes.items()}
        layers = frozenset(layer for layer, window in windows.items() if window)
        is_told = all((kinds[layer] == "sliding_attention") == (layer in layers) for layer in shapes)
        if not layers or len(layers) == len(shapes) or not is_told:
            return None
        window = max(windows.values())
        if self.max_length and window >= self.max_length:
            return None
        session_tokens = min(giving_back.session_tokens, self.max_length or giving_back.session_tokens)
        return SlidingLayers(layers, window, giving_back.pass_tokens, session_tokens)

    @property
    def model_impl(self) -> str:
        """Whose code computes a pass: SPECDEC or TRANSFORMERS."""
        return TRANSFORMERS if self.why_transformers else SPECDEC

    @property
    def attention_types(self) -> dict[int, str]:
        """Attention type of each layer that stores KV of its own."""
        return attention_types(self.model, self.pool.keys)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], captured: AbstractSet[str] = frozenset()) -> list[Tensor]:
        """One pass over all segments.

        Args:
            captured: names of the hidden states to keep in the pool.

        Returns:
            Per segment the logits [num_logits, vocab_size] of its last tokens, in the model's dtype.
        """
        for segment in segments:
            self.pool.clear_before(segment.allocation, segment.start, segment.stop)
        current = self._pass(segments)
        self.capture.start(current, captured)
        return current.split(self._run(current))

    def _pass(self, segments: Sequence[Segment]) -> Pass:
        bucket = Bucket.of(segments) if self.fills_up and fits(segments) else None
        return Pass(
            segments,
            dtype=self.dtype,
            device=self.device,
            joins_branches=self.joins_branches,
            bucket=bucket,
        )

    def _run(self, current: Pass) -> Tensor:
        self._forward.prepare(current)
        return self._forward(current, self.pool, self.capture)

    @torch.inference_mode()
    def _self_test(self, expected: Tensor, rounding: float) -> None:
        """Compare with the model's own attention, in two chunks: a feature ours lacks would show here."""
        num_tokens = len(expected)
        allocation = self.pool.allocate(num_tokens)
        tokens, half = self.trial_tokens(num_tokens), num_tokens // 2
        chunks = [
            Segment(allocation, 0, tokens[:half], half),
            Segment(allocation, half, tokens[half:], num_tokens - half),
        ]
        outputs, passes = zip(*(self.trial_pass(chunk) for chunk in chunks), strict=True)
        error = _relative_error(torch.cat(outputs), expected)
        self.pool.free(allocation)
        layer_types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        windowed = any(window for current in passes for window in current.windows)
        right = error <= max(_PROBE_TOLERANCE[self.dtype.itemsize], _MOST_ROUNDING * rounding)
        if not right or ("sliding_attention" in layer_types and not windowed):
            raise InvalidArgumentError(
                f"{type(self.model).__name__} gives other logits over the KV pool than with its own "
                f"attention (relative error {error:.3g}): it has a feature this service does not support.",
                reason="UNSUPPORTED_MODEL",
            )

    def _settle_memory(self) -> None:
        """Copy what is left of a mapped checkpoint: a view into it would keep all of it in memory."""
        if self.device.type == "cpu" and self.dtype is torch.bfloat16:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()

    def trial_pass(self, segment: Segment) -> tuple[Tensor, Pass]:
        """Logits of a pass over one segment, and the pass. For trials, whose sessions nobody else knows."""
        current = self._pass([segment])
        self.capture.start(current, frozenset())
        return current.split(self._run(current))[0], current

    def trial_tokens(self, num_tokens: int) -> list[int]:
        """Token ids spread over the vocabulary."""
        return probe_tokens(self.vocab_size, num_tokens)


def attention_types(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, str]:
    """Attention type of each of a model's layers."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    # Older configurations say it once for all layers.
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return {layer: layer_types[layer] if layer_types else default for layer in layers}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())
