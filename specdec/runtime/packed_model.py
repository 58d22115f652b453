"""Any Hugging Face causal LM, run over the KV pool: the tokens of many sessions in one forward pass.

The model's own code is untouched. All sessions' new tokens are concatenated into a batch of one with their
own position ids; `paged_attention` lets each session see its own keys and values only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.attention import Segment
from specdec.runtime.attention_plan import Pass
from specdec.runtime.capture import HiddenCapture
from specdec.runtime.kv_pool import KvPool, KvShape, join_slots
from specdec.runtime.memory import StateMemory
from specdec.runtime.paged_attention import ATTENTION_NAME, PoolCache
from specdec.runtime.prepack import prepack_linears, stable_head
from specdec.runtime.tree_keys import Branches

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MIN_PASS_TOKENS = 2
"""A pass over one token is padded to this many. Matrix products with a single row take another path through
oneDNN, which rounds otherwise in bf16: padded, plain decoding and verification give the same bits."""
_NUM_PROBE_TOKENS = 8
_PROBE_TOLERANCE = {4: 1e-3, 2: 0.2}
"""Largest relative error of the probe's logits, by bytes per element."""


class PackedModel:
    """A causal LM and the KV pool of its sessions."""

    def __init__(
        self, model: PreTrainedModel, *, kv_budget_bytes: int, memory: StateMemory | None = None
    ) -> None:
        """Switch `model` to attention over a pool of `kv_budget_bytes`, in `memory` or in private memory.

        Raises:
            InvalidArgumentError: the model does not work this way, or the budget is less than one block.
        """
        self.model = model.eval()
        _refuse_unsupported(model)
        self.device: torch.device = model.device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        text_config = model.config.get_text_config()
        self.max_length: int = getattr(text_config, "max_position_embeddings", 0) or 0
        head = model.get_output_embeddings()
        prepack_linears(model, keep=head)
        model.set_output_embeddings(stable_head(head))
        expected, shapes = probe(model)
        model.set_attn_implementation(ATTENTION_NAME)
        self.pool = KvPool(
            shapes, budget_bytes=kv_budget_bytes, dtype=model.dtype, device=self.device, memory=memory
        )
        self.capture = HiddenCapture(model, self.pool)
        self._self_test(expected)
        self.branches = Branches.APART
        """How branches of draft trees are computed."""

    @property
    def attention_types(self) -> dict[int, str]:
        """Attention type of each layer that stores KV of its own."""
        return attention_types(self.model, self.pool.keys)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], captured: AbstractSet[str] = frozenset()) -> list[Tensor]:
        """Run one pass over all segments.

        Args:
            captured: names of the hidden states to keep in the pool.

        Returns:
            Per segment the logits [num_logits, vocab_size] of its last tokens, in the model's dtype.
        """
        for segment in segments:
            if segment.start == 0:
                self.pool.clear(segment.allocation)
        current = Pass(segments, self._write_slots(segments), branches=self.branches)
        self.capture.start(current, captured)
        return self._forward(current)

    def _forward(self, current: Pass) -> list[Tensor]:
        segments = current.segments
        token_ids = [token_id for segment in segments for token_id in segment.token_ids]
        positions = [position for segment in segments for position in segment.positions]
        padding = max(0, _MIN_PASS_TOKENS - len(token_ids))
        token_ids += token_ids[-1:] * padding
        positions += positions[-1:] * padding
        output = self.model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            past_key_values=PoolCache(self.pool, current),
            use_cache=True,
            logits_to_keep=_logit_rows(segments).to(self.device),
        )
        return list(output.logits[0].split([segment.num_logits for segment in segments]))

    @torch.inference_mode()
    def _self_test(self, expected: Tensor) -> None:
        """Compare with the model's own attention, in two chunks: a feature ours lacks would show here."""
        allocation = self.pool.allocate(_NUM_PROBE_TOKENS)
        probe, half = _probe_tokens(self.vocab_size), _NUM_PROBE_TOKENS // 2
        chunks = [
            Segment(allocation, 0, probe[:half], half),
            Segment(allocation, half, probe[half:], half),
        ]
        outputs, passes = zip(*(self.trial_pass(chunk) for chunk in chunks), strict=True)
        logits = torch.cat(outputs).float()
        self.pool.free(allocation)
        error = ((logits - expected).norm() / expected.norm()).item()
        layer_types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        windowed = any(window for current in passes for window in current.windows)
        right = error <= _PROBE_TOLERANCE[self.model.dtype.itemsize]
        if not right or ("sliding_attention" in layer_types and not windowed):
            raise InvalidArgumentError(
                f"{type(self.model).__name__} gives other logits over the KV pool than with its own "
                f"attention (relative error {error:.3g}): it has a feature this service does not support.",
                reason="UNSUPPORTED_MODEL",
            )

    def trial_pass(self, segment: Segment, branches: Branches = Branches.APART) -> tuple[Tensor, Pass]:
        """Return the logits of a pass over one segment, and the pass. Only the trial knows its sessions."""
        current = Pass([segment], self._write_slots([segment]), branches=branches)
        return self._forward(current)[0], current

    def trial_tokens(self, num_tokens: int) -> list[int]:
        """Return token ids spread over the vocabulary."""
        return _probe_tokens(self.vocab_size, num_tokens)

    def _write_slots(self, segments: Sequence[Segment]) -> slice | Tensor:
        slots = [segment.allocation.slots(segment.start, segment.stop) for segment in segments]
        return join_slots(slots, self.device)


def attention_types(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, str]:
    """Return the attention type of each of a model's layers."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    # Older configurations say it once for all layers.
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return {layer: layer_types[layer] if layer_types else default for layer in layers}


def _logit_rows(segments: Sequence[Segment]) -> Tensor:
    """Return the indices, in the packed batch, of the tokens whose logits are wanted."""
    rows: list[int] = []
    stop = 0
    for segment in segments:
        stop += len(segment.token_ids)
        rows.extend(range(stop - segment.num_logits, stop))
    return torch.tensor(rows, dtype=torch.long)


def _refuse_unsupported(model: PreTrainedModel) -> None:
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


class _ShapeRecorder(Cache):
    """Notes the geometry of every layer that stores KV of its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, KvShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Record and pass through: a first chunk attends over itself."""
        self.shapes[layer_idx] = KvShape(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing is cached."""
        return 0


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[Tensor, dict[int, KvShape]]:
    """Return the probe's logits [tokens, vocab_size] by the model's own attention, and each layer's KV shape.

    The geometry is observed because configurations name it in too many ways.
    """
    recorder = _ShapeRecorder()
    model.set_attn_implementation("eager")
    probe = _probe_tokens(model.get_output_embeddings().weight.shape[0])
    token_ids = torch.tensor([probe], device=model.device)
    positions = torch.arange(len(probe), device=model.device)[None]
    output = model(input_ids=token_ids, position_ids=positions, past_key_values=recorder, use_cache=True)
    return output.logits[0].float(), recorder.shapes


def _probe_tokens(vocab_size: int, num_tokens: int = _NUM_PROBE_TOKENS) -> list[int]:
    """Return token ids spread over the vocabulary."""
    return [(17 + 7919 * index) % vocab_size for index in range(num_tokens)]
