"""Training of MTP drafters: Gemma 4 assistants for any target.

Every token of an answer is an anchor. K steps are unrolled from all anchors at once: step k reads the true
token at anchor + k - 1 and the state of step k - 1, attends over the target's keys and values before the
anchor, and learns the target's distribution of the token at anchor + k. A step goes on with the anchors
whose drafts were right so far, and some of the others: a draft that follows a wrong one is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig, PreTrainedModel

from drafter_service.drafters.mtp.layers import AssistantLayers, TargetKv
from drafter_service.training.batch import Anchors, FrozenHead, PackedBatch, even_rows
from drafter_service.training.data import TokenData
from drafter_service.training.features import FeatureSource, SequenceFeatures, pool_bytes
from drafter_service.training.loop import Trainee
from drafter_service.training.warm_start import warm_start
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.kv_pool import KvShape
from specdec.runtime.loading import LoadedModel
from specdec.runtime.packed_model import PackedModel, attention_types, probe
from specdec.state.weights import TargetWeights

_WEIGHTS = "model.safetensors"
KEEP_REJECTED = 0.25
"""Share of the anchors with a wrong draft that go on to the next step."""


@dataclass(frozen=True, slots=True, eq=False)
class _MaskedKv:
    """Keys and values of the sequences of a batch; an anchor sees those before it."""

    kv: Sequence[tuple[Tensor, Tensor]]  # per sequence [num_heads, num_tokens, head_dim]
    anchors: Anchors

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attention of queries [num_heads, num_anchors, head_dim]."""
        counts = torch.bincount(self.anchors.sequence, minlength=len(self.kv)).tolist()
        outputs = []
        for (keys, values), own, positions in zip(
            self.kv, queries.split(counts, dim=1), self.anchors.position.split(counts), strict=True
        ):
            if not len(positions):
                continue
            before = torch.arange(keys.shape[1], device=keys.device)
            seen = before < positions[:, None]
            if sliding_window is not None:
                # As in serving: the window reaches back from the last committed key, that one included.
                seen &= before >= positions[:, None] - 1 - sliding_window
            repeats = queries.shape[0] // keys.shape[0]
            outputs.append(
                scaled_dot_product_attention(
                    own[None],
                    keys.repeat_interleave(repeats, 0)[None].to(own.dtype),
                    values.repeat_interleave(repeats, 0)[None].to(own.dtype),
                    attn_mask=seen,
                    scale=scaling,
                )[0]
            )
        return torch.cat(outputs, dim=1)


class MtpTrainee(Trainee):
    """An assistant being trained: fp32 weights, inputs scaled to unit size.

    The scales are folded into the projections when it is saved, so that training sees inputs of one size and
    the checkpoint is a plain assistant.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: TargetWeights,
        draft_vocab: Tensor,  # [draft_vocab_size] ascending token ids
        kv_layers: dict[str, int],
        hidden_scale: float,
        num_steps: int,
        target_id: str,
    ) -> None:
        super().__init__()
        device = weights.lm_head.device
        self.model: Any = model.to(device).float()
        # The target's are used.
        self.model.lm_head = self.model.model.embed_tokens = nn.Identity()
        self.layers = AssistantLayers(model)
        self.weights, self.target_id = weights, target_id
        self.kv_layers = kv_layers
        self.num_steps = num_steps
        self.head = FrozenHead(weights, draft_vocab)
        self.embedding_scale = 1.0 / (weights.embedding[draft_vocab].float().square().mean().sqrt().item())
        self.embedding_scale /= weights.embedding_scale
        self.hidden_scale = hidden_scale

    def _kv(self, batch: PackedBatch, anchors: Anchors) -> dict[str, TargetKv]:
        return {
            kind: _MaskedKv(
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
        """One draft step: what the head reads, and the next hidden [num_anchors, hidden_size], scaled."""
        embeddings = self.weights.embed(token_ids) * self.embedding_scale
        return self.layers.step(
            embeddings.to(hidden.dtype), hidden, anchors.position, self._kv(batch, anchors)
        )

    def first_hidden(self, batch: PackedBatch, anchors: Anchors) -> Tensor:
        """The target's last hidden states before the anchors, scaled."""
        return batch.last_hidden[anchors.row - 1] * self.hidden_scale

    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """Mean over anchors and steps of the cross entropy against the target's distribution.

        That is the KL divergence but for a constant, over the draft vocabulary.
        """
        batch = PackedBatch.of(features)
        everyone = torch.ones_like(batch.anchors.row, dtype=torch.bool)
        anchors = batch.anchors.take(_going_on(everyone, everyone, generator))
        total, count = torch.zeros((), device=batch.token_ids.device), 0
        hidden = self.first_hidden(batch, anchors)
        for distance in range(self.num_steps):
            states, hidden = self.step(batch, anchors, batch.token_ids[anchors.row + distance], hidden)
            logits = self.head.logits(states).float()
            target = self.head.target(batch.last_hidden[anchors.row + distance])
            total = total + cross_entropy(logits, target, reduction="sum")
            count += len(logits)
            right = self.head.is_right(logits, batch.token_ids[anchors.row + distance + 1])
            index = _going_on(right, batch.has_token(anchors, distance + 2), generator)
            if not len(index):
                break
            anchors, hidden = anchors.take(index), hidden[index]
        return total / count

    @property
    def _input_scales(self) -> Tensor:
        """Of the columns of pre_projection [2 * backbone_hidden_size]."""
        width = self.weights.embedding.shape[1]
        scales = torch.full((2 * width,), self.embedding_scale, device=self.weights.embedding.device)
        scales[width:] = self.hidden_scale
        return scales

    def identity(self) -> dict[str, Any]:
        """What it is besides its weights."""
        return {
            "method": "mtp",
            "target": self.target_id,
            "num_layers": len(self.model.model.layers),
            "unroll": self.num_steps,
            "kv_layers": dict(self.kv_layers),
            "embedding_scale": self.embedding_scale,
            "hidden_scale": self.hidden_scale,
            **self.head.identity(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights of the assistant as its checkpoint has them, bf16, by name."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        weights |= {name: buffer for name, buffer in self.model.named_buffers() if "layer_scalar" in name}
        weights["pre_projection.weight"] = weights["pre_projection.weight"] * self._input_scales
        weights["post_projection.weight"] = weights["post_projection.weight"] / self.hidden_scale
        return {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}

    def load(self, folder: Path) -> None:
        """Start from the weights of a checkpoint.

        Raises:
            InvalidArgumentError: it is of another shape.
        """
        try:
            weights = {name: weight.float() for name, weight in load_file(folder / _WEIGHTS).items()}
            weights["pre_projection.weight"] /= self._input_scales.cpu()
            weights["post_projection.weight"] *= self.hidden_scale
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"{folder} is no drafter like this one: {error}", field="init"
            ) from error
        strange = [*missing, *unexpected]
        if strange:
            raise InvalidArgumentError(
                f"{folder} is no drafter like this one: see {', '.join(strange[:3])}.", field="init"
            )

    def save(self, folder: Path) -> None:
        """Write the checkpoint: config, weights without a head, and the draft vocabulary."""
        self.model.config.save_pretrained(folder)
        save_file(self.tensors(), folder / _WEIGHTS, metadata={"format": "pt"})
        self.head.save(folder)

    @torch.no_grad()
    def accepted(self, features: Sequence[SequenceFeatures], draft_depth: int) -> list[list[int]]:
        """Per sequence and anchor, the draft tokens a greedy target accepts."""
        batch = PackedBatch.of(features)
        accepted = self._accepted(batch, draft_depth)
        counts = torch.bincount(batch.anchors.sequence, minlength=len(features)).tolist()
        return [part.tolist() for part in accepted.split(counts)]

    def _accepted(self, batch: PackedBatch, num_steps: int) -> Tensor:
        anchors = batch.anchors
        num_accepted = torch.zeros_like(anchors.row)
        alive = torch.arange(len(anchors.row), device=anchors.row.device)
        hidden = self.first_hidden(batch, anchors)
        for distance in range(num_steps):
            states, hidden = self.step(batch, anchors, batch.token_ids[anchors.row + distance], hidden)
            right = self.head.is_right(self.head.logits(states), batch.token_ids[anchors.row + distance + 1])
            num_accepted[alive[right]] += 1
            index = (right & batch.has_token(anchors, distance + 2)).nonzero()[:, 0]
            if not len(index):
                break
            anchors, hidden, alive = anchors.take(index), hidden[index], alive[index]
        return num_accepted


def _going_on(right: Tensor, can_go_on: Tensor, generator: torch.Generator) -> Tensor:
    """Indices, ascending, of the anchors that take the next step: those that are right first.

    Args:
        right: whose drafts were right so far [num_anchors].
        can_go_on: which have a token to learn [num_anchors].
    """
    num_able = int(can_go_on.sum())
    num_right = int((right & can_go_on).sum())
    num_wanted = num_right + round(KEEP_REJECTED * (num_able - num_right))
    order = torch.rand(len(right), generator=generator).to(right.device) + right - 2.0 * ~can_go_on
    return order.topk(even_rows(num_wanted, num_able)).indices.sort().values


def assistant_config(target: PreTrainedModel, num_layers: int, kv: KvShape) -> Gemma4AssistantConfig:
    """Config of an assistant as wide as the target, with full attention over one layer's KV."""
    config = target.config.get_text_config()
    rope = dict(config.rope_parameters)
    rope = rope.get("full_attention", rope)
    text = Gemma4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_kv_shared_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=kv.num_heads,
        head_dim=kv.key_dim,
        global_head_dim=kv.key_dim,
        hidden_activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        layer_types=["full_attention"] * num_layers,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        enable_moe_block=False,
        use_double_wide_mlp=False,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
    )
    return Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=config.hidden_size,
        specdec_target_head=True,
        dtype=torch.bfloat16,
    )


def make_trainee(
    loaded: LoadedModel,
    data: TokenData,
    *,
    num_layers: int,
    num_steps: int,
    draft_vocab_size: int,
    pool_tokens: int,
) -> tuple[MtpTrainee, FeatureSource]:
    """An assistant for a target, warm-started from it, and where its features come from.

    Args:
        loaded: the target; it can only be evaluated from here on.
        num_steps: draft steps that are unrolled in training.
        pool_tokens: tokens the target reads in one pass; a sequence must not be longer.

    Raises:
        InvalidArgumentError: the target is not one a drafter can be trained for.
    """
    target = loaded.model
    weights = TargetWeights.of(target)
    decoder_layers = len(target.get_decoder().layers)
    if num_layers >= decoder_layers:
        raise InvalidArgumentError(
            f"The target has {decoder_layers} layers; a drafter needs fewer.", field="layers"
        )
    # All that is copied or measured comes first: packing makes the target's linears opaque.
    shapes = probe(target)[1]
    kinds = attention_types(target, shapes)
    kv_layer = max((layer for layer in shapes if kinds[layer] == "full_attention"), default=max(shapes))
    if shapes[kv_layer].key_dim != shapes[kv_layer].value_dim:
        raise InvalidArgumentError("Keys and values of the target differ in size; an assistant's do not.")
    config = assistant_config(target, num_layers, shapes[kv_layer])
    # The folder has no tokenizer: by this a drafter service knows whose tokens they are.
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
        loaded.model_id,
    )
    packed = PackedModel(target, kv_budget_bytes=pool_bytes(shapes, target.dtype, pool_tokens))
    return trainee, FeatureSource(packed, kv_layers=[kv_layer])
