"""The two weights of the target that drafters use as well: input embedding and LM head.

Mapped from the verifier's memory where both share a host, else read alone from the target's checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.contract.errors import InvalidArgumentError, NotFoundError
from specdec.contract.target_state import StateStorage, TensorRef
from specdec.runtime.decoder.families import softcap_of
from specdec.runtime.decoder.layers import softcapped
from specdec.runtime.memory import StateMemory, dtype_name
from specdec.v1 import target_state_pb2 as pb

_EMBEDDING, _LM_HEAD = "embedding", "lm_head"
_INDEX = "model.safetensors.index.json"
_ALIGNMENT = 256
_UNSUPPORTED_SCALES = ("logits_scaling", "logit_scale", "embedding_multiplier")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class TargetWeights:
    """Input embedding and LM head of a target, to be read only."""

    embedding: Tensor  # [vocab_size, hidden_size]
    lm_head: Tensor  # [vocab_size, hidden_size]
    embedding_scale: float = 1.0
    """What the model multiplies embeddings with."""
    final_logit_softcap: float = 0.0
    """Cap of the logits; 0: none."""
    _scale: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Gemma rounds the scale to the weights' type first.
        scale = torch.tensor(self.embedding_scale, device=self.embedding.device).to(self.embedding.dtype)
        object.__setattr__(self, "_scale", scale)

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetWeights:
        """Return the weights of a model in this process.

        Raises:
            InvalidArgumentError: it has a head with a bias, or scales no drafter expects.
        """
        input_module, head = _modules_of(model)
        return cls(
            input_module.weight.detach(),
            head.weight.detach(),
            _scale_of(input_module),
            softcap_of(model.config),
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the input embeddings [..., hidden_size] as the target's own module gives them."""
        rows = embedding(token_ids, self.embedding)
        if self.embedding_scale == 1.0:
            return rows
        return rows * self._scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab_size] of hidden states [..., hidden_size] after the final norm."""
        return softcapped(linear(hidden, self.lm_head), self.final_logit_softcap)


@dataclass(frozen=True, slots=True)
class TargetWeightsRef:
    """Where a target's weights are; see specdec.v1.GetTargetWeightsResponse."""

    model_id: str
    embedding: TensorRef
    lm_head: TensorRef
    embedding_scale: float
    final_logit_softcap: float

    def to_proto(self) -> pb.GetTargetWeightsResponse:
        """Return the message of the weights."""
        return pb.GetTargetWeightsResponse(
            model_id=self.model_id,
            embedding=self.embedding.to_proto(),
            lm_head=self.lm_head.to_proto(),
            embedding_scale=self.embedding_scale,
            final_logit_softcap=self.final_logit_softcap,
        )

    @classmethod
    def from_proto(cls, message: pb.GetTargetWeightsResponse) -> TargetWeightsRef:
        """Read the message."""
        return cls(
            message.model_id,
            TensorRef.from_proto(message.embedding),
            TensorRef.from_proto(message.lm_head),
            message.embedding_scale or 1.0,
            message.final_logit_softcap,
        )


def share_weights(model: PreTrainedModel, memory: StateMemory, model_id: str) -> TargetWeightsRef:
    """Move a model's embedding and LM head into memory that others can map; on the engine thread.

    Raises:
        ResourceExhaustedError: there is no room.
    """
    input_module, _ = _modules_of(model)
    moved = _move(_shared_weights(model), memory)
    return TargetWeightsRef(
        model_id,
        moved[_EMBEDDING],
        moved.get(_LM_HEAD, moved[_EMBEDDING]),
        _scale_of(input_module),
        softcap_of(model.config),
    )


def shared_weights_bytes(model: PreTrainedModel) -> int:
    """Return the size of the memory that `share_weights` asks for; 0 if the weights cannot be shared."""
    try:
        return sum(_aligned(weight.nbytes) for weight in _shared_weights(model).values())
    except InvalidArgumentError:
        return 0


def _shared_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    input_module, head = _modules_of(model)
    weights = {_EMBEDDING: input_module.weight}
    if head.weight is not input_module.weight:
        weights[_LM_HEAD] = head.weight
    return weights


def _modules_of(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the embedding and head modules.

    Raises:
        InvalidArgumentError: a head with a bias, or scales no drafter expects.
    """
    text_config = model.config.get_text_config()
    for scale in _UNSUPPORTED_SCALES:
        if getattr(text_config, scale, None) not in (None, 1, 1.0):
            raise InvalidArgumentError(
                f"The target has a {scale}; sharing its weights with drafters is not supported.",
                reason="UNSUPPORTED_MODEL",
            )
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InvalidArgumentError(
            "The target's LM head has a bias; sharing it is not supported.", reason="UNSUPPORTED_MODEL"
        )
    return model.get_input_embeddings(), head


def _move(weights: Mapping[str, nn.Parameter], memory: StateMemory) -> dict[str, TensorRef]:
    """Replace parameters' memory by one region of `memory`, unless that would share nothing."""
    dtypes = {name: dtype_name(weight.dtype) for name, weight in weights.items()}
    if memory.kind is StateStorage.STREAM:
        return {name: TensorRef(name, dtypes[name], tuple(weight.shape)) for name, weight in weights.items()}
    # All or nothing: what had been moved of a part would be moved again by the next call.
    region = memory.allocate(sum(_aligned(weight.nbytes) for weight in weights.values()))
    moved, offset = {}, 0
    for name, weight in weights.items():
        shared = region.tensor[offset : offset + weight.nbytes].view(weight.dtype).view(weight.shape)
        with torch.inference_mode():
            shared.copy_(weight)
        weight.data = shared
        moved[name] = TensorRef(name, dtypes[name], tuple(weight.shape), region.locate(offset))
        offset += _aligned(weight.nbytes)
    return moved


def _aligned(num_bytes: int) -> int:
    """Return the next size after which another tensor may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _scale_of(input_module: nn.Module) -> float:
    scale = getattr(input_module, "scalar_embed_scale", getattr(input_module, "embed_scale", 1.0))
    return float(scale)


def read_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> TargetWeights:
    """Read the embedding and LM head of a checkpoint; no other tensor is read.

    Raises:
        InvalidArgumentError: the folder does not hold a causal LM with safetensors weights.
        NotFoundError: the checkpoint lacks a tensor.
    """
    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InvalidArgumentError(f"{folder} does not hold a causal LM: {error}", field="target") from error
    input_module, head = _modules_of(skeleton)
    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    files = _files_by_tensor(folder)
    weight = _read(folder, files, names[id(input_module.weight)], dtype, device)
    tied = head.weight is input_module.weight or config.get_text_config().tie_word_embeddings
    return TargetWeights(
        embedding=weight,
        lm_head=weight if tied else _read(folder, files, names[id(head.weight)], dtype, device),
        embedding_scale=_scale_of_config(skeleton, config),
        final_logit_softcap=softcap_of(config),
    )


def _scale_of_config(skeleton: PreTrainedModel, config: Any) -> float:
    """Return the embedding's scale of a model without values: buffers on the meta device have none."""
    input_module: Any = skeleton.get_input_embeddings()
    if hasattr(input_module, "scalar_embed_scale"):
        return float(input_module.scalar_embed_scale)
    if hasattr(input_module, "embed_scale"):
        return float(config.get_text_config().hidden_size ** 0.5)
    return 1.0


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _read(
    folder: Path, files: dict[str, Path], name: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Read one tensor by the model's own name; checkpoints of multimodal models have longer ones."""
    tail = ".".join(name.split(".")[-2:])
    matches = [key for key in files if key in (name, tail) or key.endswith(f".{tail}")]
    if name in matches:
        matches = [name]
    if len(matches) != 1:
        raise NotFoundError(f"{folder} has {len(matches)} tensors that could be {name}; expected one.")
    with safe_open(files[matches[0]], framework="pt") as file:
        tensor: Tensor = file.get_tensor(matches[0])
    return tensor.to(device=device, dtype=dtype)
