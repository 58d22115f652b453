"""Training of DFlash drafters: block diffusion (arXiv 2602.06036).

A step draws anchors among the tokens of answers. Each gets a block of its own, the anchor and masks, which
sees the context before the anchor and itself; every mask learns the target's distribution of its token. The
first drafts of a block count most, since later ones are used only where those are right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel, PreTrainedModel

from drafter_service.drafters.dflash.checkpoint import TRANSFORMERS_NAMES
from drafter_service.drafters.dflash.layers import BlockLayers
from drafter_service.drafters.dflash.markov import PREFIX, MarkovHead, split_weights
from drafter_service.training.batch import Anchors, FrozenHead, PackedBatch
from drafter_service.training.data import TokenData
from drafter_service.training.features import FeatureSource, SequenceFeatures, pool_bytes
from drafter_service.training.loop import Trainee
from drafter_service.training.warm_start import BlockScales, warm_start_block
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.kv_pool import KvShape
from specdec.runtime.loading import LoadedModel
from specdec.runtime.packed_model import PackedModel, probe
from specdec.state.weights import TargetWeights

_WEIGHTS = "model.safetensors"
_DECAY = 4.0
"""Drafts after which a draft's weight has fallen to 1 / e."""
_EVALUATED_ANCHORS = 256
"""Blocks that go through the layers together where acceptance is measured."""


class _BatchKv:
    """Keys and values of the sequences of a batch: a block sees those before its anchor, and its own."""

    def __init__(self, batch: PackedBatch, anchors: Anchors, block_size: int) -> None:
        lengths = batch.lengths.tolist()
        counts = torch.bincount(anchors.sequence, minlength=len(lengths)).tolist()
        self._block_size, self._num_context = block_size, sum(lengths)
        self._lengths, self._num_rows = lengths, [count * block_size for count in counts]
        self._hidden = [
            (torch.arange(length, device=positions.device) >= positions[:, None]).repeat_interleave(
                block_size, 0
            )
            for positions, length in zip(anchors.position.split(counts), lengths, strict=True)
        ]
        """Of each sequence [num_blocks * block_size, length]: the context its blocks do not see."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention of the blocks, sequence by sequence."""
        rows = zip(
            self._hidden,
            (queries.to(values.dtype) * scaling).split(self._num_rows, 1),
            *(
                part.to(values.dtype)[:, : self._num_context].split(self._lengths, 1)
                for part in (keys, values)
            ),
            *(
                part.to(values.dtype)[:, self._num_context :].split(self._num_rows, 1)
                for part in (keys, values)
            ),
            strict=True,
        )
        return torch.cat([self._attend_one(*parts) for parts in rows if parts[1].shape[1]], dim=1)

    def _attend_one(
        self,
        hidden: Tensor,
        queries: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        block_keys: Tensor,
        block_values: Tensor,
    ) -> Tensor:
        """One softmax over context and own block, but two products: keys of other blocks cost nothing.

        Args:
            hidden: [num_rows, num_context].
            queries: [num_heads, num_rows, head_dim], the others likewise.
        """
        (num_heads, num_rows, _), num_kv_heads = queries.shape, len(block_keys)
        folded = queries.view(num_kv_heads, num_heads // num_kv_heads, num_rows, -1)
        # [num_kv_heads, num_heads a KV head, num_blocks, block_size, ...]
        in_blocks = folded.unflatten(2, (-1, self._block_size))
        own_keys, own_values = (
            part.view(num_kv_heads, 1, -1, self._block_size, part.shape[-1])
            for part in (block_keys, block_values)
        )
        to_context = (folded @ context_keys[:, None].mT).masked_fill(hidden, float("-inf"))
        to_block = (in_blocks @ own_keys.mT).flatten(2, 3)
        shares = torch.cat([to_context, to_block], dim=-1).softmax(-1, dtype=torch.float32)
        shares = shares.to(queries.dtype)
        of_context = shares[..., : hidden.shape[1]] @ context_values[:, None]
        of_block = shares[..., hidden.shape[1] :].unflatten(2, (-1, self._block_size)) @ own_values
        attended: Tensor = of_context + of_block.flatten(2, 3)
        return attended.reshape(queries.shape)


class DFlashTrainee(Trainee):
    """A block diffusion drafter being trained: fp32 weights, inputs scaled to the size the target's have.

    The scales are folded into the context projection, and written to the config, when it is saved.
    """

    def __init__(
        self,
        model: MuseGlimmerAssistantModel,
        weights: TargetWeights,
        draft_vocab: Tensor,  # [draft_vocab_size] ascending token ids
        scales: BlockScales,
        num_anchors: int,
        markov_rank: int,
        target_id: str,
        vocabulary_fingerprint: str,
    ) -> None:
        super().__init__()
        self.model: Any = model.to(weights.embedding.device).float()
        self.encoder = self.model.encoder
        self.layers = BlockLayers(model)
        self.markov = None
        if markov_rank:
            device = weights.embedding.device
            self.markov = MarkovHead(model.config.hidden_size, markov_rank).to(device)
        self.weights, self.scales, self.num_anchors = weights, scales, num_anchors
        self.head = FrozenHead(weights, draft_vocab)
        self.layer_ids = tuple(self.model.config.target_layer_ids)
        self.target_id, self.fingerprint = target_id, vocabulary_fingerprint

    @property
    def max_draft_depth(self) -> int:
        """Masks of a block."""
        return int(self.model.config.block_size) - 1

    @property
    def _input_scales(self) -> Tensor:
        """Of the columns of the context projection [num_layers * hidden_size]."""
        scales = torch.tensor(self.scales.hidden, device=self.weights.embedding.device)
        return scales.repeat_interleave(self.weights.embedding.shape[1])

    def states(self, batch: PackedBatch, anchors: Anchors, block_size: int) -> Tensor:
        """What the head reads at the masks [num_anchors, block_size - 1, hidden_size]."""
        context = torch.cat([item.hidden(self.layer_ids) for item in batch.features])
        token_ids = batch.token_ids.new_full((len(anchors.row), block_size), self.model.config.mask_token_id)
        token_ids[:, 0] = batch.token_ids[anchors.row]
        embeddings = self.weights.embed(token_ids.flatten()).float() * self.scales.embedding
        steps = torch.arange(block_size, device=anchors.row.device)
        states = self.layers(
            self.encoder(context.float() * self._input_scales),
            embeddings,
            torch.cat([torch.arange(len(item.token_ids), device=steps.device) for item in batch.features]),
            (anchors.position[:, None] + steps).flatten(),
            _BatchKv(batch, anchors, block_size),
        )
        return states.view(len(anchors.row), block_size, -1)[:, 1:]

    def _head_states(self, states: Tensor, previous: Tensor) -> Tensor:
        """What the head reads of places [num_rows, hidden_size].

        Args:
            states: of the places [num_rows, hidden_size].
            previous: tokens before them [num_rows]. That these are the target's own is no loss of truth: a
                draft counts only where those before it are the same.
        """
        return self.markov(states, self.weights.embed(previous).float()) if self.markov else states

    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """Weighted mean over the masks of the cross entropy against the target's distribution.

        That is the KL divergence but for a constant, over the draft vocabulary.
        """
        batch = PackedBatch.of(features)
        drawn = torch.randperm(len(batch.anchors.row), generator=generator)[: self.num_anchors]
        anchors = batch.anchors.take(drawn.sort().values.to(batch.token_ids.device))
        block_size: int = self.model.config.block_size
        states = self.states(batch, anchors, block_size)
        distances = torch.arange(block_size - 1, device=states.device)
        is_there = anchors.position[:, None] + distances + 1 < batch.lengths[anchors.sequence][:, None]
        # Places after an answer's end weigh nothing: as many rows in every step, whose kernels are made once.
        weights = (torch.exp(-distances / _DECAY) * is_there).flatten()
        rows = (anchors.row[:, None] + distances).clamp_(max=len(batch.token_ids) - 1).flatten()
        losses = cross_entropy(
            self.head.logits(self._head_states(states.flatten(0, 1), batch.token_ids[rows])).float(),
            self.head.target(batch.last_hidden[rows]),
            reduction="none",
        )
        return (losses * weights).sum() / weights.sum()

    @torch.no_grad()
    def accepted(self, features: Sequence[SequenceFeatures], draft_depth: int) -> list[list[int]]:
        """Per sequence and anchor, the draft tokens a greedy target accepts."""
        batch = PackedBatch.of(features)
        indices = torch.arange(len(batch.anchors.row), device=batch.token_ids.device)
        parts = [
            self._accepted(batch, batch.anchors.take(index), draft_depth)
            for index in indices.split(_EVALUATED_ANCHORS)
        ]
        counts = torch.bincount(batch.anchors.sequence, minlength=len(features)).tolist()
        return [part.tolist() for part in torch.cat(parts).split(counts)]

    def _accepted(self, batch: PackedBatch, anchors: Anchors, draft_depth: int) -> Tensor:
        """Of anchors [num_anchors], the drafts before the first wrong one."""
        states = self.states(batch, anchors, draft_depth + 1)
        steps = torch.arange(1, draft_depth + 1, device=states.device)
        is_there = anchors.position[:, None] + steps < batch.lengths[anchors.sequence][:, None]
        rows = (anchors.row[:, None] + steps).clamp(max=len(batch.token_ids) - 1)
        previous = batch.token_ids[rows - 1].flatten()
        logits = self.head.logits(self._head_states(states.flatten(0, 1), previous))
        right = self.head.is_right(logits, batch.token_ids[rows].flatten()).view(is_there.shape)
        return (right & is_there).cumprod(1).sum(1)

    def identity(self) -> dict[str, Any]:
        """What it is besides its weights."""
        config = self.model.config
        return {
            "method": "dflash",
            "target": self.target_id,
            "num_layers": config.num_hidden_layers,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "context_layers": list(self.layer_ids),
            "anchors": self.num_anchors,
            "markov_rank": self.markov.state.out_features if self.markov else 0,
            "hidden_scales": list(self.scales.hidden),
            "embedding_scale": self.scales.embedding,
            **self.head.identity(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights as z-lab names them, bf16."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        weights["fc.weight"] = self.encoder.fc.weight.detach() * self._input_scales
        weights |= {f"{PREFIX}{name}": weight for name, weight in self._markov_weights().items()}
        weights["hidden_norm.weight"] = self.encoder.output_norm_enc.weight.detach()
        return {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}

    def _markov_weights(self) -> dict[str, Tensor]:
        return {} if self.markov is None else self.markov.state_dict()

    def load(self, folder: Path) -> None:
        """Start from the weights of a checkpoint that `save` wrote.

        Raises:
            InvalidArgumentError: it is of another shape.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = {
                TRANSFORMERS_NAMES.get(name, name): weight.float()
                for name, weight in load_file(folder / _WEIGHTS).items()
            }
            weights["encoder.fc.weight"] /= self._input_scales.cpu()
            self._load_markov(split_weights(weights))
            encoder = {name: weights.pop(f"encoder.{name}") for name in list(self.encoder.state_dict())}
            self.encoder.load_state_dict(encoder)
            self.model.load_state_dict(weights)
            given = BlockScales(self.scales.hidden, self._own_scale(config))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"{folder} is no drafter like this one: {error}", field="init"
            ) from error
        self.scales = given

    def _load_markov(self, weights: dict[str, Tensor]) -> None:
        """Take the Markov head of a checkpoint; one without leaves ours as it began."""
        if weights and not self.markov:
            raise ValueError("it has a Markov head; leave --markov-rank 0 away")
        if weights and self.markov:
            self.markov.load_state_dict(weights)

    def _own_scale(self, config: dict[str, Any]) -> float:
        """The embedding scale of a checkpoint, which was trained for one target's layers and one mask."""
        own = {"target_layer_ids": list(self.layer_ids), "mask_token_id": self.model.config.mask_token_id}
        for name, value in own.items():
            if config["dflash_config"][name] != value:
                raise ValueError(f"its {name} is {config['dflash_config'][name]}, not {value}")
        return float(config["dflash_config"]["input_embedding_scale"]) / self.weights.embedding_scale

    def save(self, folder: Path) -> None:
        """Write the checkpoint as z-lab's are: config, weights without a head; and the draft vocabulary."""
        (folder / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n")
        save_file(self.tensors(), folder / _WEIGHTS, metadata={"format": "pt"})
        self.head.save(folder)

    def _config(self) -> dict[str, Any]:
        config = self.model.config
        shape = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
            *("num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters"),
            *("max_position_embeddings", "layer_types"),
        )
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "dtype": "bfloat16",
            "vocab_size": len(self.weights.embedding),
            "attention_bias": False,
            "tie_word_embeddings": False,
            **{name: getattr(config, name) for name in shape},
            "dflash_config": {
                "block_size": config.block_size,
                "mask_token_id": config.mask_token_id,
                "target_layer_ids": list(self.layer_ids),
                "input_embedding_scale": self.scales.embedding * self.weights.embedding_scale,
                "final_logit_softcapping": self.weights.final_logit_softcap,
            },
            "specdec_vocabulary_fingerprint": self.fingerprint,
        }


def drafter_config(
    target: PreTrainedModel,
    kv: KvShape,
    *,
    num_layers: int,
    layer_ids: Sequence[int],
    block_size: int,
    mask_token_id: int,
) -> MuseGlimmerAssistantConfig:
    """Config of a drafter as wide as the target, with attention over the whole context.

    Args:
        kv: geometry of the target's last layer.
    """
    config = target.config.get_text_config()
    rope = dict(config.rope_parameters)
    return MuseGlimmerAssistantConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=kv.num_heads,
        head_dim=kv.key_dim,
        hidden_act=getattr(config, "hidden_activation", None) or config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=_plain_rope(rope.get("full_attention", rope)),
        max_position_embeddings=config.max_position_embeddings,
        layer_types=["full_attention"] * num_layers,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=list(layer_ids),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The target's base; scaled frequencies of long contexts are not the drafter's affair."""
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]}


def context_layers(num_layers: int, count: int) -> list[int]:
    """Target layers to read, spread from the second to the last but one; at most all of these."""
    spread = numpy.linspace(1, num_layers - 2, count) if count > 1 else numpy.array([num_layers - 2])
    return sorted({round(layer_id) for layer_id in spread.tolist()})


def mask_token(data: TokenData, vocab_size: int, init: Path | None = None) -> int:
    """What masks are: the token of the drafter a run starts from, or the highest that no sequence has.

    Raises:
        InvalidArgumentError: there is none, or the drafter's cannot be read.
    """
    if init:
        try:
            return int(json.loads((init / "config.json").read_text())["dflash_config"]["mask_token_id"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"{init} is no drafter like this one: {error!r}", field="init"
            ) from error
    unused = numpy.flatnonzero(numpy.bincount(data.token_ids, minlength=vocab_size) == 0)
    if not len(unused):
        raise InvalidArgumentError("Every token occurs in the data; none is left to be the mask.")
    return int(unused[-1])


def make_trainee(
    loaded: LoadedModel,
    data: TokenData,
    *,
    num_layers: int,
    num_context_layers: int,
    block_size: int,
    num_anchors: int,
    draft_vocab_size: int,
    pool_tokens: int,
    markov_rank: int = 0,
    init: Path | None = None,
) -> tuple[DFlashTrainee, FeatureSource]:
    """A block diffusion drafter for a target, warm-started from it, and where its features come from.

    Args:
        loaded: the target; it can only be evaluated from here on.
        num_context_layers: target layers whose hidden states are the context.
        num_anchors: blocks of a step.
        pool_tokens: tokens the target reads in one pass; a sequence must not be longer.
        markov_rank: width of the head by which a draft depends on the one before it; 0: no such head.
        init: the drafter whose weights will be loaded.

    Raises:
        InvalidArgumentError: the target is not one a drafter can be trained for.
    """
    target = loaded.model
    weights = TargetWeights.of(target)
    decoder_layers = len(target.get_decoder().layers)
    if decoder_layers < max(num_layers + 1, 3):
        raise InvalidArgumentError(
            f"The target has {decoder_layers} layers; a drafter needs fewer.", field="layers"
        )
    shapes = probe(target)[1]
    layer_ids = context_layers(decoder_layers, num_context_layers)
    mask_token_id = mask_token(data, len(weights.embedding), init)
    drafter = MuseGlimmerAssistantModel(
        drafter_config(
            target,
            shapes[max(shapes)],
            num_layers=num_layers,
            layer_ids=layer_ids,
            block_size=block_size,
            mask_token_id=mask_token_id,
        )
    )
    # Packing makes the target's linears opaque: all that is copied or measured comes before.
    scales = warm_start_block(drafter, target, layer_ids, data[0].token_ids)
    trainee = DFlashTrainee(
        drafter,
        weights,
        torch.from_numpy(data.draft_vocab(draft_vocab_size)),
        scales,
        num_anchors,
        markov_rank,
        loaded.model_id,
        loaded.vocabulary_fingerprint,
    )
    packed = PackedModel(target, kv_budget_bytes=pool_bytes(shapes, target.dtype, pool_tokens))
    return trainee, FeatureSource(packed, hidden_layers=layer_ids)
