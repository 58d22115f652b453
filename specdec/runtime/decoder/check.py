"""A comparison of every layer written out with the model's own, before its weights are taken over.

Both compute in fp32, from the same inputs: then rounding is small, and a feature that a layer lacks is not.
The comparison goes layer by layer, so that errors do not grow with depth and a report can name the layer. The
model's own layers become fp32 and back while it runs, which changes no weight and takes the memory of one
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from specdec.runtime.attention import Segment
from specdec.runtime.decoder.decoder import PoolKv
from specdec.runtime.decoder.families import (
    embedding_of,
    final_norm_of,
    kv_shapes,
    layer_of,
    per_layer_embedding_of,
    rotaries_of,
    shape_of,
    softcap_of,
)
from specdec.runtime.decoder.layers import softcapped
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.model_pass import Pass
from specdec.runtime.prepack import head_multiplier
from specdec.runtime.transformers_pass import probe_tokens

TOLERANCE = 1e-3
"""Largest relative error of a part in fp32; of a layer, relative to what it adds."""
_HEAD_TOLERANCE = 0.05
"""The same of the LM head, which is compared in its own type."""
_LEAST_SHARE = 0.01
_LEAST_TOKENS, _MOST_TOKENS = 8, 48
_SMALL_PARTS = ("norm", "per_layer_model_projection", "per_layer_projection_norm")
"""Parts besides the layers that compute in fp32 all the while."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    finding: str
    """What differs first; empty: nothing does."""
    logits: Tensor
    """Logits of the tokens [tokens, vocab_size], whose layers computed in fp32."""


def compare(model: PreTrainedModel) -> Comparison:
    """Compare a model of the dense families with itself written out. It is the same afterwards."""
    return _Run(model).compare()


class _Run:
    """Runs the model over a few tokens and, after every part of it, ours over the same inputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._decoder, self._head = model, model.get_decoder(), model.get_output_embeddings()
        self._dtype, self._device = model.dtype, model.device
        self._finding = ""
        self._token_ids = self._probe()
        self._pool, self._chunks = self._passes()
        rotaries = rotaries_of(self._decoder)
        self._tables = [
            {name: rotary.table(chunk.positions, torch.float32) for name, rotary in rotaries.items()}
            for chunk in self._chunks
        ]
        self._restore: Callable[[], None] = lambda: None
        """Gives the layer that runs its own weights back."""
        self._own: Sequence[Tensor] = ()
        """What each layer has of an embedding of its own [tokens, size]."""

    def _probe(self) -> list[int]:
        """As many tokens as leave the smallest window, if that is a few."""
        windows = {shape_of(self._decoder, index).window for index in range(len(self._decoder.layers))}
        num_tokens = min(min(windows - {0}, default=0) + _LEAST_TOKENS, _MOST_TOKENS)
        return probe_tokens(self._head.weight.shape[0], num_tokens)

    def _passes(self) -> tuple[KvPool, list[Pass]]:
        """A pool, and the tokens in two chunks: the second reads what the first has stored."""
        shapes = kv_shapes(self._decoder)
        num_bytes = (
            sum(shape.num_elements for shape in shapes.values()) * BLOCK_TOKENS * torch.float32.itemsize
        )
        pool = KvPool(shapes, budget_bytes=num_bytes, dtype=torch.float32, device=self._device)
        allocation = pool.allocate(len(self._token_ids))
        half = len(self._token_ids) // 2
        chunks = (0, self._token_ids[:half]), (half, self._token_ids[half:])
        return pool, [
            Pass([Segment(allocation, start, tokens, len(tokens))], dtype=torch.float32, device=self._device)
            for start, tokens in chunks
        ]

    @torch.inference_mode()
    def compare(self) -> Comparison:
        """Run the model, and compare on the way."""
        implementation = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        with ExitStack() as stack:
            stack.callback(self._model.set_attn_implementation, implementation)
            for name in _SMALL_PARTS:
                if part := getattr(self._decoder, name, None):
                    stack.callback(_widen(part))
            for name in ("embed_tokens", "embed_tokens_per_layer"):
                if part := getattr(self._decoder, name, None):
                    stack.enter_context(_hook(part.register_forward_hook(_to_fp32)))
            for index, layer in enumerate(self._decoder.layers):
                before = partial(self._before_layer, index)
                stack.enter_context(_hook(layer.register_forward_pre_hook(before)))
                stack.enter_context(_hook(layer.register_forward_hook(partial(self._after_layer, index))))
            stack.enter_context(_hook(self._decoder.norm.register_forward_hook(self._after_norm)))
            stack.enter_context(
                _hook(self._head.register_forward_pre_hook(lambda _m, inputs: (inputs[0].to(self._dtype),)))
            )
            token_ids = torch.tensor([self._token_ids], device=self._device)
            logits = self._model(input_ids=token_ids, use_cache=False).logits[0]
        self._note("the LM head", self._logits(), logits, tolerance=_HEAD_TOLERANCE)
        return Comparison(self._finding, logits)

    def _before_layer(self, index: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._restore = _widen(module)
        if not index:
            self._embed(inputs[0][0])
        if self._own:
            self._note(f"the embedding of layer {index}", self._own[index], inputs[1][0])

    def _embed(self, embedded: Tensor) -> None:
        token_ids = torch.tensor(self._token_ids, device=self._device)
        self._note("the embedding", embedding_of(self._decoder.embed_tokens)(token_ids).float(), embedded)
        if per_layer := per_layer_embedding_of(self._decoder):
            self._own = per_layer(token_ids, embedded)

    def _after_layer(self, index: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        layer = layer_of(self._decoder, index)
        found = []
        for chunk, tables in zip(self._chunks, self._tables, strict=True):
            rows = slice(chunk.segments[0].start, chunk.segments[0].stop)
            own = self._own[index][rows] if self._own else None
            found.append(layer(inputs[0][0, rows], tables, PoolKv(self._pool, chunk), own))
        self._note(f"layer {index}", torch.cat(found), output[0], inputs[0][0])
        self._restore()

    def _after_norm(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._normed = final_norm_of(self._decoder)(inputs[0][0])
        self._note("the final norm", self._normed, output[0])

    def _logits(self) -> Tensor:
        logits = head_multiplier(self._head)(self._normed.to(self._dtype))
        return softcapped(logits, softcap_of(self._model.config))

    def _note(
        self,
        what: str,
        found: Tensor,
        expected: Tensor,
        before: Tensor | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Compare what a part gives with what it should; `before`: what a layer adds to."""
        expected = expected.float()
        scale = expected.norm()
        if before is not None:
            # What a layer adds may be little beside what it is added to.
            scale = torch.maximum((expected - before).norm(), scale * _LEAST_SHARE)
        error = ((found.float() - expected).norm() / scale).item()
        if not error <= tolerance and not self._finding:
            self._finding = f"{what} differs (relative error {error:.3g})"


def _widen(module: nn.Module) -> Callable[[], None]:
    """Make a module's weights fp32 and return what gives it back its own, which are not copied."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    own = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()

    def restore() -> None:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data

    return restore


def _to_fp32(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


@contextmanager
def _hook(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
