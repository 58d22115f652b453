"""Training of MTP drafters: Gemma 4 assistants for any target.

Every token of an answer is an anchor. K steps are unrolled from all anchors at once: step k reads the true
token at anchor + k - 1 and the state of step k - 1, attends over the target's keys and values before the
anchor, and learns the target's distribution of the token at anchor + k. The next step takes the anchors whose
drafts were right so far, and some of the others: a draft that follows a wrong one is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma4AssistantForCausalLM, PreTrainedModel

from drafter_service.drafters.mtp.layers import AssistantLayers, TargetKv
from drafter_service.training.architecture import assistant_config
from drafter_service.training.attention import AnchorKv
from drafter_service.training.batch import Anchors, FrozenHead, PackedBatch, even_rows
from drafter_service.training.data import TokenData
from drafter_service.training.features import FeatureSource, SequenceFeatures, pool_bytes
from drafter_service.training.losses import LOSSES
from drafter_service.training.trainee import Trainee, unlike
from drafter_service.training.warm_start import warm_start
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import LoadedModel
from specdec.runtime.packed_model import PackedModel, attention_types
from specdec.runtime.transformers_pass import probe
from specdec.state.weights import TargetWeights

_WEIGHTS = "model.safetensors"
KEEP_REJECTED = 0.25
"""Share of the anchors with a wrong draft that go on to the next step."""


class MtpTrainee(Trainee):
    """An assistant in training: fp32 weights, inputs scaled to unit size.

    Saving folds the scales into the projections: training sees inputs of one size, and the checkpoint is a
    plain assistant.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: TargetWeights,
        draft_vocab: Tensor,  # [draft_vocab_size] ascending token ids
        kv_layers: dict[str, int],
        hidden_scale: float,
        num_steps: int,
        loss: str,
        target_id: str,
    ) -> None:
        super().__init__()
        device = weights.lm_head.device
        self.model: Any = model.to(device).float()
        # The target's embedding and head are used.
        self.model.lm_head = self.model.model.embed_tokens = nn.Identity()
        self.layers = AssistantLayers(model)
        self.weights, self.target_id = weights, target_id
        self.kv_layers = kv_layers
        self.num_steps = num_steps
        self.loss_name, self.row_loss = loss, LOSSES[loss]
        self.head = FrozenHead(weights, draft_vocab)
        self.embedding_scale = 1.0 / (weights.embedding[draft_vocab].float().square().mean().sqrt().item())
        self.embedding_scale /= weights.embedding_scale
        self.hidden_scale = hidden_scale

    def _kv(self, batch: PackedBatch, anchors: Anchors) -> dict[str, TargetKv]:
        return {
            kind: AnchorKv(
                [
                    (keys.transpose(0, 1), values.transpose(0, 1))
                    for keys, values in (item.kv(layer) for item in batch.features)
                ],
                anchors,
            )
            for kind, layer in self.kv_layers.items()
        }

    def step(
        self, batch: PackedBatch, anchors: Anchors, token_ids: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one draft step; return what the head reads and the next hidden states, scaled.

        Both are [num_anchors, hidden_size].
        """
        embeddings = self.weights.embed(token_ids) * self.embedding_scale
        return self.layers.step(
            embeddings.to(hidden.dtype), hidden, anchors.position, self._kv(batch, anchors)
        )

    def first_hidden(self, batch: PackedBatch, anchors: Anchors) -> Tensor:
        """Return the target's last hidden states before the anchors, scaled."""
        return batch.last_hidden[anchors.row - 1] * self.hidden_scale

    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """Return the mean loss over anchors and steps."""
        batch = PackedBatch.of(features)
        everyone = torch.ones_like(batch.anchors.row, dtype=torch.bool)
        anchors = batch.anchors.take(_going_on(everyone, everyone, generator))
        total, count = torch.zeros((), device=batch.token_ids.device), 0
        hidden = self.first_hidden(batch, anchors)
        for distance in range(self.num_steps):
            states, hidden = self.step(batch, anchors, batch.token_ids[anchors.row + distance], hidden)
            rows = anchors.row + distance
            taught = self.head.teach(
                states, batch.last_hidden[rows], batch.token_ids[rows + 1], self.row_loss
            )
            total = total + taught.losses.sum()
            count += len(states)
            index = _going_on(taught.right, batch.has_token(anchors, distance + 2), generator)
            if not len(index):
                break
            anchors, hidden = anchors.take(index), hidden[index]
        return total / count

    @property
    def _input_scales(self) -> Tensor:
        """Factors of the columns of pre_projection [2 * backbone_hidden_size]."""
        width = self.weights.embedding.shape[1]
        scales = torch.full((2 * width,), self.embedding_scale, device=self.weights.embedding.device)
        scales[width:] = self.hidden_scale
        return scales

    def identity(self) -> dict[str, Any]:
        """Describe the drafter without its weights, in plain values."""
        return {
            "method": "mtp",
            "target": self.target_id,
            "num_layers": len(self.model.model.layers),
            "unroll": self.num_steps,
            "loss": self.loss_name,
            "kv_layers": dict(self.kv_layers),
            "embedding_scale": self.embedding_scale,
            "hidden_scale": self.hidden_scale,
            **self.head.identity(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights as an assistant's checkpoint names them, in bf16."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        weights |= {name: buffer for name, buffer in self.model.named_buffers() if "layer_scalar" in name}
        weights["pre_projection.weight"] = weights["pre_projection.weight"] * self._input_scales
        weights["post_projection.weight"] = weights["post_projection.weight"] / self.hidden_scale
        return {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}

    def load(self, folder: Path) -> None:
        """Start from the weights of a checkpoint.

        Raises:
            InvalidArgumentError: the checkpoint has another shape.
        """
        try:
            weights = {name: weight.float() for name, weight in load_file(folder / _WEIGHTS).items()}
            weights["pre_projection.weight"] /= self._input_scales.cpu()
            weights["post_projection.weight"] *= self.hidden_scale
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise unlike(folder, error) from error
        if strange := [*missing, *unexpected]:
            raise unlike(folder, f"see {', '.join(strange[:3])}.")

    def save(self, folder: Path) -> None:
        """Write the checkpoint: config, weights without a head, and the draft vocabulary."""
        self.model.config.save_pretrained(folder)
        save_file(self.tensors(), folder / _WEIGHTS, metadata={"format": "pt"})
        self.head.save(folder)

    def num_accepted(self, batch: PackedBatch, draft_depth: int) -> Tensor:
        """Count, for the anchors of a batch [num_anchors], the drafts before the first wrong one."""
        anchors = batch.anchors
        num_accepted = torch.zeros_like(anchors.row)
        alive = torch.arange(len(anchors.row), device=anchors.row.device)
        hidden = self.first_hidden(batch, anchors)
        for distance in range(draft_depth):
            states, hidden = self.step(batch, anchors, batch.token_ids[anchors.row + distance], hidden)
            right = self.head.is_right(self.head.logits(states), batch.token_ids[anchors.row + distance + 1])
            num_accepted[alive[right]] += 1
            index = (right & batch.has_token(anchors, distance + 2)).nonzero()[:, 0]
            if not len(index):
                break
            anchors, hidden, alive = anchors.take(index), hidden[index], alive[index]
        return num_accepted


def _going_on(right: Tensor, can_go_on: Tensor, generator: torch.Generator) -> Tensor:
    """Choose the anchors that take the next step, those that were right first; return ascending indices.

    Args:
        right: which anchors' drafts were right so far [num_anchors].
        can_go_on: which anchors have a token to learn [num_anchors].
    """
    num_able = int(can_go_on.sum())
    num_right = int((right & can_go_on).sum())
    num_wanted = num_right + round(KEEP_REJECTED * (num_able - num_right))
    order = torch.rand(len(right), generator=generator).to(right.device) + right - 2.0 * ~can_go_on
    return order.topk(even_rows(num_wanted, num_able)).indices.sort().values


def make_trainee(
    loaded: LoadedModel,
    data: TokenData,
    *,
    num_layers: int,
    num_steps: int,
    draft_vocab_size: int,
    pool_tokens: int,
    loss: str = "kl",
) -> tuple[MtpTrainee, FeatureSource]:
    """Make an MTP assistant for a target, warm-started from it, and the source of its features.

    Args:
        loaded: the target; afterwards it can only be evaluated.
        num_steps: number of draft steps that are unrolled in training.
        pool_tokens: tokens the target reads in one pass; a sequence must not be longer.
        loss: what is minimised, by its name in LOSSES.

    Raises:
        InvalidArgumentError: a drafter cannot be trained for the target.
    """
    target = loaded.model
    weights = TargetWeights.of(target)
    decoder_layers = len(target.get_decoder().layers)
    if num_layers >= decoder_layers:
        raise InvalidArgumentError(
            f"The target has {decoder_layers} layers; a drafter needs fewer.", field="layers"
        )
    # Packing makes the target's linears opaque: what is copied or measured comes before.
    shapes = probe(target)[1]
    kinds = attention_types(target, shapes)
    kv_layer = max((layer for layer in shapes if kinds[layer] == "full_attention"), default=max(shapes))
    if shapes[kv_layer].key_dim != shapes[kv_layer].value_dim:
        raise InvalidArgumentError("Keys and values of the target differ in size; an assistant's do not.")
    config = assistant_config(target, num_layers, shapes[kv_layer])
    # The folder has no tokenizer: this tells a drafter service which vocabulary the tokens belong to.
    config.specdec_vocabulary_fingerprint = loaded.vocabulary_fingerprint
    assistant = Gemma4AssistantForCausalLM(config)
    hidden_scale = warm_start(assistant, target, data[0].token_ids)
    trainee = MtpTrainee(
        assistant,
        weights,
        torch.from_numpy(data.draft_vocab(draft_vocab_size)),
        {"full_attention": kv_layer},
        hidden_scale,
        num_steps,
        loss,
        loaded.model_id,
    )
    packed = PackedModel(target, kv_budget_bytes=pool_bytes(shapes, target.dtype, pool_tokens))
    return trainee, FeatureSource(packed, kv_layers=[kv_layer])
