"""DFlash drafters (arXiv 2602.06036): block diffusion, a whole block of drafts in one pass.

The context is the target's: hidden states of a few of its layers, projected, of which each decoder layer
makes keys and values. These are kept: a round adds those of the positions that were committed since the
last. The block, the anchor and a mask for every draft, goes into the slots behind them and is overwritten
in the next round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from drafter_service.drafters.base import (
    CachedSession,
    Drafted,
    Drafter,
    DrafterTraits,
    DraftItem,
    DraftSession,
    OpenDraft,
)
from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from drafter_service.drafters.dflash.forward import BlockForward
from drafter_service.drafters.dflash.picking import BlockPicker
from drafter_service.drafters.dflash.rounds import BlockRound, PassKv
from drafter_service.drafters.growing import GrowingTree, growing_tree
from drafter_service.drafters.head import DraftHead
from specdec.contract.errors import SpecdecError
from specdec.contract.sampling import validate_token_ids
from specdec.contract.target_state import TargetStateSpec
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.memory import dtype_name
from specdec.runtime.prepack import multiplier, prepack_linears
from specdec.state.weights import TargetWeights


class DFlashDrafter(Drafter):
    """Drafts a block for all sessions of a step in one pass."""

    def __init__(
        self,
        name: str,
        checkpoint: DFlashCheckpoint,
        *,
        kv_budget_bytes: int,
        max_draft_depth: int,
        max_draft_nodes: int = 64,
    ) -> None:
        model, settings = checkpoint.model, checkpoint.settings
        config, self._settings = model.config, settings
        self._dtype, self._device = model.dtype, model.device
        self._hidden_size: int = config.hidden_size
        self.projection = checkpoint.projection
        own = None if checkpoint.lm_head is None else multiplier(checkpoint.lm_head)
        self._head = DraftHead(
            checkpoint.draft_vocab,
            own,
            self._dtype,
            vocab_size=settings.vocab_size,
            scale=settings.logit_scale,
            softcap=settings.logit_softcap,
        )
        parts = checkpoint.parts
        self._layers, self._begin = BlockForward(model, parts.changes), parts.begin
        if isinstance(parts.links, nn.Module):
            prepack_linears(parts.links)
        self._picker = BlockPicker(self._head, parts.links, self._device)
        shape = KvShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self.kv_pool = self._pool = KvPool(
            dict.fromkeys(range(config.num_hidden_layers), shape),
            budget_bytes=kv_budget_bytes,
            dtype=self._dtype,
            device=self._device,
        )
        max_depth = min(max_draft_depth, settings.max_draft_depth)
        self.traits = DrafterTraits(
            name=name,
            family=checkpoint.family,
            max_draft_depth=max_depth,
            max_draft_nodes=max_draft_nodes,
            default_draft_depth=min(settings.default_draft_depth or max_depth, max_depth),
            model_id=checkpoint.model_id,
            revision=checkpoint.revision,
            vocabulary_fingerprint=settings.vocabulary_fingerprint,
            vocab_size=settings.vocab_size,
            max_length=checkpoint.max_length,
            dtype=dtype_name(self._dtype),
            device=str(self._device),
            target_state_spec=TargetStateSpec(
                hidden_layer_ids=settings.target_layer_ids, projection=self.projection.info
            ),
            needs_target_weights=True,
        )

    def open(self, request: OpenDraft) -> CachedSession:
        """Open a session with room for its context and a block behind it.

        Raises:
            InvalidArgumentError: the generation is longer than the pool.
            ResourceExhaustedError: all memory is in use.
        """
        num_tokens = request.max_length + self._settings.block_size
        return CachedSession(request, self._pool.allocate(num_tokens))

    def close(self, session: DraftSession) -> None:
        """Give the session's memory back."""
        self._pool.free(_checked(session).allocation)

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        """Draft up to K tokens in a row; the sessions of one target go through the layers together."""
        return self.propose_by_target(items, self._start, self._draft)

    def _start(self, item: DraftItem) -> BlockRound | None:
        """Prepare a session's part of a pass; None: its context was read, or its generation is full.

        Raises:
            SpecdecError: what keeps the session without drafts.
        """
        session = _checked(item.session)
        self._check(session)
        if not item.draft_depth:
            self._read(session, item.num_tokens)
            return None
        num_drafts = min(item.draft_depth, session.max_length - len(session.token_ids))
        if num_drafts <= 0:
            return None
        return self._round(session, num_drafts, growing_tree(item, num_drafts) if item.wants_tree else None)

    def _check(self, session: CachedSession) -> None:
        """Refuse a session of a target that the drafter cannot follow.

        Raises:
            FailedPreconditionError: its state or weights are not what the drafter reads.
            InvalidArgumentError: it has tokens the target lacks.
        """
        view, weights = session.view, session.target_weights
        assert view is not None
        assert weights is not None
        self.refuse_misfit(session, lambda: self._misfit(weights))
        if not self.traits.vocab_size:
            # The drafter names no vocabulary, so nothing was checked when these tokens came.
            vocab_size = self._head.vocab_size(weights)
            session.sampling = session.sampling.within(vocab_size)
            validate_token_ids("committed_token_ids", session.token_ids, vocab_size)

    def _misfit(self, weights: TargetWeights) -> str:
        """Say what of the target has another size than the drafter reads; empty: everything fits."""
        width = weights.embedding.shape[1]
        if width != self._hidden_size:
            return f"it reads embeddings of {self._hidden_size} elements, the target's have {width}"
        return self._head.misfit(weights, self._settings.mask_token_id + 1)

    def _read(self, session: CachedSession, num_tokens: int) -> None:
        """Keep keys and values of the next part of a long context."""
        stop = session.num_cached + min(num_tokens, session.num_prefill_tokens)
        # A pass needs a block; nobody reads what this one gives, and what follows overwrites it.
        self._run([BlockRound(session, self._context(session, stop), session.token_ids[stop : stop + 1], 0)])

    def _round(self, session: CachedSession, num_drafts: int, tree: GrowingTree | None) -> BlockRound:
        assert session.view is not None
        num_masks = num_drafts - 1 if self._settings.sample_from_anchor else num_drafts
        block = [session.token_ids[-1], *[self._settings.mask_token_id] * num_masks]
        return BlockRound(session, self._context(session, session.view.length), block, num_drafts, tree)

    def _context(self, session: CachedSession, stop: int) -> Tensor:
        """Project the target's hidden states of the positions before `stop` that were not read yet."""
        assert session.view is not None
        return session.view.projected(session.num_cached, stop).to(self._dtype)

    def _draft(self, rounds: Sequence[BlockRound]) -> list[Drafted]:
        """Run the blocks of one target's sessions in one pass, and pick their drafts."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        return self._picker.draft(rounds, self._run(rounds), weights)

    def _run(self, rounds: Sequence[BlockRound]) -> Tensor:
        """Run one pass; return states of the blocks [num_rows, hidden_size]."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        token_ids = torch.tensor([token for part in rounds for token in part.block], device=self._device)
        self._begin([len(part.block) for part in rounds], self._device)
        states = self._layers(
            torch.cat([part.context for part in rounds]),
            self._embed(token_ids, weights),
            _positions(((part.start, part.anchor) for part in rounds), self._device),
            _positions(((part.anchor, part.stop) for part in rounds), self._device),
            PassKv(self._pool, rounds, self._settings.masks),
        )
        for part in rounds:
            part.session.num_cached = part.anchor
        return states

    def _embed(self, token_ids: Tensor, weights: TargetWeights) -> Tensor:
        scale = self._settings.embedding_scale
        if scale is None:
            return weights.embed(token_ids).to(self._dtype)
        return embedding(token_ids, weights.embedding).to(self._dtype) * scale


def _checked(session: DraftSession) -> CachedSession:
    assert isinstance(session, CachedSession)
    return session


def _positions(runs: Iterator[tuple[int, int]], device: torch.device) -> Tensor:
    """Return the positions of several runs, one after the other [num_rows]."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])
