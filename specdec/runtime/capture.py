"""Hidden states of named layers, copied into the pool while a pass computes them."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import Tensor

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import LAST_HIDDEN, hidden_name
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import write_rows
from specdec.runtime.model_pass import Pass

AFTER_NORM = -1


class HiddenCapture:
    """Writes what a pass makes of its tokens to the pool's hidden states, by name.

    Args:
        num_layers: layers whose hidden states can be captured.
        hidden_size: elements of a hidden state.
        pool: where hidden states go; the slots are those of the pass.
    """

    def __init__(self, num_layers: int, hidden_size: int, pool: KvPool) -> None:
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self._pool = pool
        self._names = {AFTER_NORM: LAST_HIDDEN} | {index: hidden_name(index) for index in range(num_layers)}
        self._current: Pass | None = None
        self._wanted: AbstractSet[str] = frozenset()

    def check(self, name: str) -> None:
        """Refuse what this model does not have.

        Raises:
            InvalidArgumentError: no such hidden state.
        """
        if name not in self._names.values():
            raise InvalidArgumentError(
                f"The target has no {name!r}; its layers are 0 to {self.num_layers - 1}.",
                field="target_state_spec",
            )

    def start(self, current: Pass, wanted: AbstractSet[str]) -> None:
        """Capture `wanted` in the pass that begins; on the engine thread."""
        self._current, self._wanted = current, wanted

    def __call__(self, layer: int, hidden: Tensor) -> None:
        """Keep a layer's output [rows, hidden_size] if it is wanted, but for what pads the pass.

        Args:
            layer: its index; AFTER_NORM: the output is that of the final norm.
        """
        if self._wanted and (name := self._names[layer]) in self._wanted:
            assert self._current is not None
            write_rows(self._pool.hidden[name], self._current.slots, hidden[: self._current.num_stored])
