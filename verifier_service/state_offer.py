"""What target state a verifier can give, and what of it a drafter's spec asks for."""

from __future__ import annotations

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import LAST_HIDDEN, TargetStateSpec, key_name, value_name
from specdec.runtime.capture import HiddenCapture
from specdec.state.view import num_projection_bytes

_PROJECTION_DTYPES = ("bfloat16", "float16", "float32")
_MAX_PROJECTION_GROWTH = 4
"""Most a projection's output may be, in hidden sizes."""
_MAX_PROJECTION_BYTES = 2**30
"""Most a projection's weights may be: several times those of the largest known drafter."""


class StateOffer:
    """The state that a target has.

    Args:
        capture: what hidden states the model has.
        attention_types: per layer that stores KV.
        max_hidden_layers: hidden states kept at most, all sessions together.
    """

    def __init__(
        self, capture: HiddenCapture, attention_types: dict[int, str], *, max_hidden_layers: int
    ) -> None:
        self.hidden_size = capture.hidden_size
        self.max_hidden_layers = max_hidden_layers
        self._capture = capture
        self._attention_types = attention_types

    @property
    def any_kv_name(self) -> str:
        """Name of a tensor that every target has."""
        return key_name(next(iter(self._attention_types)))

    def attention_type(self, name: str) -> str:
        """Return the attention type of the layer of a tensor of KV; it is empty for other tensors."""
        return self._attention_types[int(name.split(".")[1])] if name.startswith("kv.") else ""

    def names(self, spec: TargetStateSpec) -> tuple[list[str], list[str]]:
        """Return the names of the hidden states that a spec asks for, and those of keys and values.

        Raises:
            InvalidArgumentError: the target does not have them, they are too many, or there are none; or it
                cannot make the spec's projection.
        """
        hidden_names, kv_names = self._hidden_names(spec), self._kv_names(spec)
        if not hidden_names and not kv_names:
            raise InvalidArgumentError("The spec names nothing.", field="target_state_spec")
        self._check_projection(spec)
        return hidden_names, kv_names

    def why_not(self, spec: TargetStateSpec) -> str:
        """Return why a session can never export what a spec asks for; empty: it can, if there is room."""
        try:
            self.names(spec)
        except InvalidArgumentError as error:
            return error.message
        return ""

    def _hidden_names(self, spec: TargetStateSpec) -> list[str]:
        if len(spec.hidden_layer_ids) > self.max_hidden_layers:
            raise InvalidArgumentError(
                f"The spec lists hidden states of {len(spec.hidden_layer_ids)} layers; this verifier keeps "
                f"at most {self.max_hidden_layers}; raise --max-hidden-layers.",
                field="target_state_spec",
            )
        names = list(spec.hidden_names)
        if spec.last_hidden_state:
            names.append(LAST_HIDDEN)
        for name in names:
            self._capture.check(name)
        return names

    def _kv_names(self, spec: TargetStateSpec) -> list[str]:
        if len(spec.kv_layer_ids) > len(self._attention_types):
            raise InvalidArgumentError(
                f"The spec lists KV of {len(spec.kv_layer_ids)} layers; the target has that of "
                f"{len(self._attention_types)}.",
                field="target_state_spec",
            )
        layer_ids = set(spec.kv_layer_ids)
        for layer_id in spec.kv_layer_ids:
            if layer_id not in self._attention_types:
                raise InvalidArgumentError(
                    f"Layer {layer_id} of the target stores no KV of its own; those that do are "
                    f"{', '.join(map(str, self._attention_types))}.",
                    field="target_state_spec",
                )
        if spec.kv_last_of_each_attention_type:
            layer_ids |= set({kind: layer for layer, kind in sorted(self._attention_types.items())}.values())
        return [name for layer in sorted(layer_ids) for name in (key_name(layer), value_name(layer))]

    def _check_projection(self, spec: TargetStateSpec) -> None:
        info, hidden_size = spec.projection, self.hidden_size
        if info is None:
            return
        num_values = len(spec.hidden_layer_ids) * hidden_size
        if info.input_size != num_values:
            raise InvalidArgumentError(
                f"The projection takes {info.input_size} values, the spec's hidden states are {num_values}.",
                field="target_state_spec",
            )
        is_small = 0 < info.output_size <= _MAX_PROJECTION_GROWTH * hidden_size
        if not is_small or info.dtype not in _PROJECTION_DTYPES:
            raise InvalidArgumentError(
                f"A {info.dtype} projection to {info.output_size} values does not fit this target: at most "
                f"{_MAX_PROJECTION_GROWTH} times its hidden size of {hidden_size}, "
                f"{' or '.join(_PROJECTION_DTYPES)}.",
                field="target_state_spec",
            )
        if num_projection_bytes(info) > _MAX_PROJECTION_BYTES:
            raise InvalidArgumentError(
                f"The projection's weights are {num_projection_bytes(info) / 2**20:.0f} MiB; at most "
                f"{_MAX_PROJECTION_BYTES // 2**20} MiB are taken.",
                field="target_state_spec",
            )
