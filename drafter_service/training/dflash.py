"""Training of DFlash drafters: block diffusion (arXiv 2602.06036).

A step draws anchors among the tokens of answers. Each gets its own block of anchor and masks, which sees the
context before the anchor and itself; every mask learns the target's distribution of its token. The first
drafts of a block count most, since later ones are used only where the earlier ones are right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MuseGlimmerAssistantModel

from drafter_service.drafters.dflash.checkpoint import TRANSFORMERS_NAMES
from drafter_service.drafters.dflash.layers import BlockLayers
from drafter_service.drafters.dflash.markov import PREFIX, MarkovHead
from drafter_service.drafters.weights import take_weights
from drafter_service.training.architecture import context_layers, dflash_config, mask_token, z_lab_config
from drafter_service.training.attention import BlockBatchKv
from drafter_service.training.batch import Anchors, FrozenHead, PackedBatch, even_rows
from drafter_service.training.data import TokenData
from drafter_service.training.features import FeatureSource, SequenceFeatures, pool_bytes
from drafter_service.training.losses import LOSSES
from drafter_service.training.trainee import Trainee, unlike
from drafter_service.training.warm_start import BlockScales, warm_start_block
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import LoadedModel
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.transformers_pass import probe
from specdec.state.weights import TargetWeights

_WEIGHTS = "model.safetensors"
_DECAY = 4.0
"""Number of drafts after which the weight of a draft has fallen to 1 / e."""
_EVALUATED_ANCHORS = 256
"""Number of blocks that go through the layers together where acceptance is measured."""


class DFlashTrainee(Trainee):
    """A block diffusion drafter in training: fp32 weights, inputs scaled to the size they have in the target.

    Saving folds the scales into the context projection and the config.
    """

    def __init__(
        self,
        model: MuseGlimmerAssistantModel,
        weights: TargetWeights,
        draft_vocab: Tensor,  # [draft_vocab_size] ascending token ids
        scales: BlockScales,
        num_anchors: int,
        markov_rank: int,
        loss: str,
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
        self.loss_name, self.row_loss = loss, LOSSES[loss]
        self.target_id, self.fingerprint = target_id, vocabulary_fingerprint

    @property
    def max_draft_depth(self) -> int:
        """Number of masks in a block."""
        return int(self.model.config.block_size) - 1

    @property
    def _input_scales(self) -> Tensor:
        """Factors of the columns of the context projection [num_layers * hidden_size]."""
        scales = torch.tensor(self.scales.hidden, device=self.weights.embedding.device)
        return scales.repeat_interleave(self.weights.embedding.shape[1])

    def states(self, batch: PackedBatch, anchors: Anchors, block_size: int) -> Tensor:
        """Return what the head reads at the masks [num_anchors, block_size - 1, hidden_size]."""
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
            BlockBatchKv(batch, anchors, block_size),
        )
        return states.view(len(anchors.row), block_size, -1)[:, 1:]

    def _head_states(self, states: Tensor, previous: Tensor) -> Tensor:
        """Return what the LM head reads of places [num_rows, hidden_size].

        Args:
            states: states of the places [num_rows, hidden_size].
            previous: the target's own tokens before them [num_rows]. A draft counts only where the drafts
                before it are the same tokens.
        """
        return self.markov(states, self.weights.embed(previous).float()) if self.markov else states

    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """Return the mean loss over masks, which are drawn by how much their drafts count."""
        batch = PackedBatch.of(features)
        drawn = torch.randperm(len(batch.anchors.row), generator=generator)[: self.num_anchors]
        anchors = batch.anchors.take(drawn.sort().values.to(batch.token_ids.device))
        block_size: int = self.model.config.block_size
        states = self.states(batch, anchors, block_size)
        distances = torch.arange(block_size - 1, device=states.device)
        is_there = anchors.position[:, None] + distances + 1 < batch.lengths[anchors.sequence][:, None]
        places = _drawn(torch.exp(-distances / _DECAY) * is_there, generator)
        rows = (anchors.row[:, None] + distances).flatten()[places]
        head_states = self._head_states(states.flatten(0, 1)[places], batch.token_ids[rows])
        taught = self.head.teach(
            head_states, batch.last_hidden[rows], batch.token_ids[rows + 1], self.row_loss
        )
        return taught.losses.mean()

    def num_accepted(self, batch: PackedBatch, draft_depth: int) -> Tensor:
        """Count, for the anchors of a batch [num_anchors], the drafts before the first wrong one."""
        indices = torch.arange(len(batch.anchors.row), device=batch.token_ids.device)
        return torch.cat(
            [
                self._num_accepted(batch, batch.anchors.take(index), draft_depth)
                for index in indices.split(_EVALUATED_ANCHORS)
            ]
        )

    def _num_accepted(self, batch: PackedBatch, anchors: Anchors, draft_depth: int) -> Tensor:
        states = self.states(batch, anchors, draft_depth + 1)
        steps = torch.arange(1, draft_depth + 1, device=states.device)
        is_there = anchors.position[:, None] + steps < batch.lengths[anchors.sequence][:, None]
        rows = (anchors.row[:, None] + steps).clamp(max=len(batch.token_ids) - 1)
        previous = batch.token_ids[rows - 1].flatten()
        logits = self.head.logits(self._head_states(states.flatten(0, 1), previous))
        right = self.head.is_right(logits, batch.token_ids[rows].flatten()).view(is_there.shape)
        return (right & is_there).cumprod(1).sum(1)

    def identity(self) -> dict[str, Any]:
        """Describe the drafter without its weights, in plain values."""
        config = self.model.config
        return {
            "method": "dflash",
            "target": self.target_id,
            "num_layers": config.num_hidden_layers,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "context_layers": list(self.layer_ids),
            "anchors": self.num_anchors,
            "loss": self.loss_name,
            "markov_rank": self.markov.state.out_features if self.markov else 0,
            "hidden_scales": list(self.scales.hidden),
            "embedding_scale": self.scales.embedding,
            **self.head.identity(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights as z-lab names them, in bf16."""
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
            InvalidArgumentError: the checkpoint has another shape.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = {
                TRANSFORMERS_NAMES.get(name, name): weight.float()
                for name, weight in load_file(folder / _WEIGHTS).items()
            }
            weights["encoder.fc.weight"] /= self._input_scales.cpu()
            self._load_markov(take_weights(weights, PREFIX))
            encoder = {name: weights.pop(f"encoder.{name}") for name in list(self.encoder.state_dict())}
            self.encoder.load_state_dict(encoder)
            self.model.load_state_dict(weights)
            given = BlockScales(self.scales.hidden, self._own_scale(config))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise unlike(folder, error) from error
        self.scales = given

    def _load_markov(self, weights: dict[str, Tensor]) -> None:
        """Take the Markov head of a checkpoint; a checkpoint without a head leaves ours untrained."""
        if weights and not self.markov:
            raise ValueError("it has a Markov head; do not pass --markov-rank 0")
        if weights and self.markov:
            self.markov.load_state_dict(weights)

    def _own_scale(self, config: dict[str, Any]) -> float:
        """Return the embedding scale of a checkpoint; its target layers and mask must be the same."""
        own = {"target_layer_ids": list(self.layer_ids), "mask_token_id": self.model.config.mask_token_id}
        for name, value in own.items():
            if config["dflash_config"][name] != value:
                raise ValueError(f"its {name} is {config['dflash_config'][name]}, not {value}")
        return float(config["dflash_config"]["input_embedding_scale"]) / self.weights.embedding_scale

    def save(self, folder: Path) -> None:
        """Write config and weights in z-lab's format, without an LM head, and the draft vocabulary."""
        config = z_lab_config(self.model.config, self.weights, self.scales, self.fingerprint)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.tensors(), folder / _WEIGHTS, metadata={"format": "pt"})
        self.head.save(folder)


def _drawn(shares: Tensor, generator: torch.Generator) -> Tensor:
    """Draw places, each with the probability that is its share; return ascending indices [num_drawn].

    Args:
        shares: how much each place counts, 0 to 1 [num_blocks, num_places].
    """
    flat = shares.flatten()
    distance = torch.rand(flat.shape, generator=generator).to(flat.device) - flat
    is_drawn = (distance < 0) & (flat > 0)
    num_drawn = even_rows(int(is_drawn.sum()), int((flat > 0).sum()))
    return distance.masked_fill(flat <= 0, torch.inf).topk(num_drawn, largest=False).indices.sort().values


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
    loss: str = "kl",
    init: Path | None = None,
) -> tuple[DFlashTrainee, FeatureSource]:
    """Make a DFlash drafter for a target, warm-started from it, and the source of its features.

    Args:
        loaded: the target; afterwards it can only be evaluated.
        num_context_layers: number of target layers whose hidden states are the context.
        num_anchors: number of blocks in a step.
        pool_tokens: tokens the target reads in one pass; a sequence must not be longer.
        markov_rank: width of the head by which a draft depends on the one before it; 0: there is none.
        loss: what is minimised, by its name in LOSSES.
        init: the drafter whose weights will be loaded.

    Raises:
        InvalidArgumentError: a drafter cannot be trained for the target.
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
        dflash_config(
            target,
            shapes[max(shapes)],
            num_layers=num_layers,
            layer_ids=layer_ids,
            block_size=block_size,
            mask_token_id=mask_token_id,
        )
    )
    # Packing makes the target's linears opaque: what is copied or measured comes before.
    scales = warm_start_block(drafter, target, layer_ids, data[0].token_ids)
    trainee = DFlashTrainee(
        drafter,
        weights,
        torch.from_numpy(data.draft_vocab(draft_vocab_size)),
        scales,
        num_anchors,
        markov_rank,
        loss,
        loaded.model_id,
        loaded.vocabulary_fingerprint,
    )
    packed = PackedModel(target, kv_budget_bytes=pool_bytes(shapes, target.dtype, pool_tokens))
    return trainee, FeatureSource(packed, hidden_layers=layer_ids)
