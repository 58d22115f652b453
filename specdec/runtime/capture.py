"""Hidden states of named layers, copied into the pool while a pass computes them.

Hooks on the layers that are exported, not `output_hidden_states`, which would keep those of all layers.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import LAST_HIDDEN, hidden_name
from specdec.runtime.attention_plan import Pass
from specdec.runtime.kv_pool import KvPool, write_rows


class HiddenCapture:
    """Writes what a pass makes of its tokens to the pool's hidden states, by name.

    Args:
        model: any causal LM whose decoder has `layers`.
        pool: where hidden states go; the slots are those of the pass.
    """

    def __init__(self, model: PreTrainedModel, pool: KvPool) -> None:
        decoder: nn.Module = model.get_decoder()
        self._pool = pool
        self._current: Pass | None = None
        self._wanted: AbstractSet[str] = frozenset()
        self._hooked: set[str] = set()
        self._modules: dict[str, nn.Module] = {LAST_HIDDEN: decoder}
        for index, layer in enumerate(getattr(decoder, "layers", ())):
            self._modules[hidden_name(index)] = layer
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]

    @property
    def num_layers(self) -> int:
        """Layers whose hidden states can be captured."""
        return len(self._modules) - 1

    def check(self, name: str) -> None:
        """Refuse what this model does not have.

        Raises:
            InvalidArgumentError: no such hidden state.
        """
        if name not in self._modules:
            raise InvalidArgumentError(
                f"The target has no {name!r}; its layers are 0 to {self.num_layers - 1}.",
                field="target_state_spec",
            )

    def start(self, current: Pass, wanted: AbstractSet[str]) -> None:
        """Capture `wanted` in the pass that begins; on the engine thread."""
        for name in wanted - self._hooked:
            self._hook(name)
        self._current, self._wanted = current, wanted

    def _hook(self, name: str) -> None:
        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in self._wanted:
                self._store(name, _hidden_of(output))

        self._modules[name].register_forward_hook(store)
        self._hooked.add(name)

    def _store(self, name: str, hidden: Tensor) -> None:
        """Keep [1, tokens, hidden_size], but for what pads the pass."""
        assert self._current is not None
        rows = hidden[0, : self._current.num_tokens]
        write_rows(self._pool.hidden[name], self._current.slots, rows)


def _hidden_of(output: Any) -> Tensor:
    """Return the hidden states [1, tokens, hidden_size] of what a layer or a decoder returns."""
    if isinstance(output, Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    result: Tensor = output[0] if hidden is None else hidden
    return result
