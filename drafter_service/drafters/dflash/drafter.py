"""DFlash drafters (arXiv 2602.06036): block diffusion, a whole block of drafts in one pass.

The context is the target's: hidden states of a few of its layers, projected, of which each decoder layer
makes keys and values. These are kept: a round adds those of the positions that were committed since the
last. The block, the anchor and a mask for every draft, goes into the slots behind them and is written over
in the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from drafter_service.drafters.base import (
    Drafted,
    Drafter,
    DrafterTraits,
    DraftItem,
    DraftSession,
    OpenDraft,
)
from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from drafter_service.drafters.dflash.layers import BlockLayers, LayerMask
from drafter_service.drafters.dflash.markov import MarkovHead
from drafter_service.drafters.growing import MAX_CHILDREN, Candidates, GrowingTree, growing_tree
from drafter_service.drafters.head import DraftHead
from specdec.contract.errors import FailedPreconditionError, SpecdecError
from specdec.contract.sampling import validate_token_ids
from specdec.contract.target_state import TargetStateSpec
from specdec.runtime.kv_pool import KvAllocation, KvPool, KvShape, join_slots, write_rows
from specdec.runtime.memory import dtype_name
from specdec.runtime.picks import PickContext
from specdec.runtime.prepack import multiplier, prepack_linears
from specdec.state.weights import TargetWeights


class DFlashSession(DraftSession):
    """Committed tokens, and how many positions of the context have keys and values."""

    def __init__(self, request: OpenDraft, allocation: KvAllocation) -> None:
        super().__init__(request)
        self.allocation = allocation
        self.num_cached = 0

    @property
    def num_prefill_tokens(self) -> int:
        """Positions of the context, as far as it is known, without keys and values."""
        return self.view.length - self.num_cached if self.view else 0


@dataclass(slots=True, eq=False)
class _Round:
    """One session's part of a pass."""

    session: DFlashSession
    context: Tensor  # [num_context, hidden_size]
    block: Sequence[int]
    """Token ids: the anchor and the masks."""
    num_drafts: int
    tree: GrowingTree | None = None
    """The draft where a tree is wanted."""

    @property
    def start(self) -> int:
        """Position of the first of the context that is new."""
        return self.session.num_cached

    @property
    def anchor(self) -> int:
        """Position of the block's first token: the context ends before it."""
        return self.start + len(self.context)

    @property
    def stop(self) -> int:
        """Position after the block."""
        return self.anchor + len(self.block)


class _PassKv:
    """Keys and values of the sessions of a pass, in the drafter's pool."""

    def __init__(self, pool: KvPool, rounds: Sequence[_Round], masks: Sequence[LayerMask]) -> None:
        self._pool, self._rounds, self._masks = pool, rounds, masks
        if len(rounds) == 1:
            # Its block lies behind its context.
            (one,) = rounds
            self._slots = one.session.allocation.slots(one.start, one.stop)
        else:
            context = [one.session.allocation.slots(one.start, one.anchor) for one in rounds]
            blocks = [one.session.allocation.slots(one.anchor, one.stop) for one in rounds]
            self._slots = join_slots([*context, *blocks], pool.device)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Store what is new and attend session by session, over views of the pool where they are one run."""
        pooled = self._pool.keys[layer], self._pool.values[layer]
        for tensor, rows in zip(pooled, (keys, values), strict=True):
            write_rows(tensor, self._slots, rows.transpose(0, 1))
        outputs, row = [], 0
        for one in self._rounds:
            own = queries[:, row : row + len(one.block)]
            outputs.append(self._attend_one(one, self._masks[layer], own, pooled, scaling))
            row += len(one.block)
        return torch.cat(outputs, dim=1)

    def _attend_one(
        self, one: _Round, mask: LayerMask, queries: Tensor, pooled: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        first = 0 if mask.reach is None else max(0, one.anchor - mask.reach)
        slots = one.session.allocation.slots(first, one.stop)
        keys, values = (tensor[slots].transpose(0, 1)[None] for tensor in pooled)
        positions = torch.arange(first, one.stop, device=queries.device)
        seen = mask.seen(positions[one.anchor - first :], positions)
        fold = queries.shape[0] // keys.shape[1]
        # Heads that share keys are queries of one attention.
        folded = queries.reshape(1, keys.shape[1], fold * len(one.block), -1)
        if seen is not None:
            seen = seen.repeat(fold, 1)
        attended = scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=scaling)
        return attended.reshape(queries.shape)


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
        self._layers = BlockLayers(model)
        prepack_linears(model, keep=model.encoder)
        self._markov = checkpoint.markov
        if self._markov:
            prepack_linears(self._markov, keep=model.encoder)
        shape = KvShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self.kv_pool = self._pool = KvPool(
            dict.fromkeys(range(config.num_hidden_layers), shape),
            budget_bytes=kv_budget_bytes,
            dtype=self._dtype,
            device=self._device,
        )
        most = min(max_draft_depth, settings.max_draft_depth)
        self.traits = DrafterTraits(
            name=name,
            family="dflash",
            max_draft_depth=most,
            max_draft_nodes=max_draft_nodes,
            default_draft_depth=min(settings.default_draft_depth or most, most),
            model_id=checkpoint.model_id,
            revision=checkpoint.revision,
            vocabulary_fingerprint=settings.vocabulary_fingerprint,
            vocab_size=settings.vocab_size,
            dtype=dtype_name(self._dtype),
            device=str(self._device),
            target_state_spec=TargetStateSpec(
                hidden_layer_ids=settings.target_layer_ids, projection=self.projection.info
            ),
            needs_target_weights=True,
        )

    def open(self, request: OpenDraft) -> DFlashSession:
        """A session with room for its context and a block behind it.

        Raises:
            InvalidArgumentError: the generation is longer than the pool.
            ResourceExhaustedError: no memory free.
        """
        num_tokens = request.max_length + self._settings.block_size
        return DFlashSession(request, self._pool.allocate(num_tokens))

    def close(self, session: DraftSession) -> None:
        """Give the session's memory back."""
        self._pool.free(_checked(session).allocation)

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        """Drafts of up to K tokens in a row; the sessions of one target go through the layers together."""
        return self.propose_by_target(items, self._start, self._draft)

    def _start(self, item: DraftItem) -> _Round | None:
        """A session's part of a pass; None: its context was read, or no more fits into the generation.

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

    def _check(self, session: DFlashSession) -> None:
        """Refuse a session of a target that the drafter cannot follow.

        Raises:
            FailedPreconditionError: its state or weights are not what the drafter reads.
            InvalidArgumentError: it has tokens the target lacks.
        """
        view, weights = session.view, session.target_weights
        assert view is not None
        assert weights is not None
        if not view.length:
            raise FailedPreconditionError(
                f"{self.traits.name} drafts from the target's state of at least one position.",
                reason="NO_TARGET_STATE",
            )
        width = weights.embedding.shape[1]
        misfit = self._head.misfit(weights, self._settings.mask_token_id + 1)
        if width != self._hidden_size:
            misfit = f"it reads embeddings of {self._hidden_size} elements, the target's have {width}"
        if misfit:
            raise FailedPreconditionError(
                f"{self.traits.name} was made for another target: {misfit}.", reason="DRAFTER_MISFIT"
            )
        if not self.traits.vocab_size:
            # Of a drafter that names no vocabulary nothing was checked when these came.
            vocab_size = self._head.vocab_size(weights)
            session.sampling.validate(vocab_size)
            validate_token_ids("committed_token_ids", session.token_ids, vocab_size)

    def _read(self, session: DFlashSession, num_tokens: int) -> None:
        """Keep keys and values of the next part of a long context."""
        stop = session.num_cached + min(num_tokens, session.num_prefill_tokens)
        # The block is for nothing: what follows is written over it.
        self._run([_Round(session, self._context(session, stop), session.token_ids[stop : stop + 1], 0)])

    def _round(self, session: DFlashSession, num_drafts: int, tree: GrowingTree | None) -> _Round:
        assert session.view is not None
        num_masks = num_drafts - 1 if self._settings.sample_from_anchor else num_drafts
        block = [session.token_ids[-1], *[self._settings.mask_token_id] * num_masks]
        return _Round(session, self._context(session, session.view.length), block, num_drafts, tree)

    def _context(self, session: DFlashSession, stop: int) -> Tensor:
        assert session.view is not None
        return session.view.projected(session.num_cached, stop).to(self._dtype)

    def _run(self, rounds: Sequence[_Round]) -> Tensor:
        """One pass; states of the blocks [num_rows, hidden_size]."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        token_ids = torch.tensor([token for one in rounds for token in one.block], device=self._device)
        states = self._layers(
            torch.cat([one.context for one in rounds]),
            self._embed(token_ids, weights),
            _positions(((one.start, one.anchor) for one in rounds), self._device),
            _positions(((one.anchor, one.stop) for one in rounds), self._device),
            _PassKv(self._pool, rounds, self._settings.masks),
        )
        for one in rounds:
            one.session.num_cached = one.anchor
        return states

    def _embed(self, token_ids: Tensor, weights: TargetWeights) -> Tensor:
        scale = self._settings.embedding_scale
        if scale is None:
            return weights.embed(token_ids).to(self._dtype)
        return embedding(token_ids, weights.embedding).to(self._dtype) * scale

    def _draft(self, rounds: Sequence[_Round]) -> list[Drafted]:
        """One pass over the blocks; then chains and trees apart."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        blocks = self._run(rounds).split([len(one.block) for one in rounds])
        # The anchor's own place comes first, and drafts nothing unless it is said to.
        places = [block[-one.num_drafts :] for one, block in zip(rounds, blocks, strict=True)]
        drafts: list[Drafted] = [[] for _ in rounds]
        for draft, is_tree in ((self._draft_chains, False), (self._draft_trees, True)):
            chosen = [index for index, one in enumerate(rounds) if (one.tree is not None) == is_tree]
            if chosen:
                states = torch.cat([places[index] for index in chosen])
                found = draft([rounds[index] for index in chosen], states, weights)
                for index, one in zip(chosen, found, strict=True):
                    drafts[index] = one
        return drafts

    def _draft_chains(
        self, rounds: Sequence[_Round], states: Tensor, weights: TargetWeights
    ) -> Sequence[Drafted]:
        """The likeliest token of every place.

        Args:
            states: of the places that draft [num_rows, hidden_size], round after round.
        """
        if self._markov:
            return self._draft_in_order(rounds, states, self._markov, weights)
        counts = [one.num_drafts for one in rounds]
        logits = self._head.logits(states, weights)
        contexts = [_pick_context(one.session) for one in rounds]
        picks = self._head.pick(logits, counts, contexts, weights)
        return [
            draft[: self._num_sure(one.session, rows, draft)]
            for one, rows, draft in zip(rounds, logits.split(counts), picks, strict=True)
        ]

    def _draft_trees(
        self, rounds: Sequence[_Round], states: Tensor, weights: TargetWeights
    ) -> Sequence[Drafted]:
        """The likeliest paths, by the product of what their places say; arguments as of _draft_chains."""
        trees = [one.tree for one in rounds if one.tree]
        if self._markov:
            self._grow_trees(rounds, trees, states, self._markov, weights)
            return [tree.tree() for tree in trees]
        logits = self._head.logits(states, weights)
        contexts = [_pick_context(one.session) for one in rounds]
        counts = [one.num_drafts for one in rounds]
        found = self._head.candidates(logits, counts, contexts, weights, MAX_CHILDREN)
        return [tree.best_paths(_by_depth(places)) for tree, places in zip(trees, found, strict=True)]

    def _grow_trees(
        self,
        rounds: Sequence[_Round],
        trees: Sequence[GrowingTree],
        states: Tensor,
        markov: MarkovHead,
        weights: TargetWeights,
    ) -> None:
        """Each step expands every tree's likeliest leaves, whose tokens correct the next places' states.

        Args:
            states: as of _draft_chains.
        """
        prepared = markov.prepared(states)
        firsts = list(accumulate((one.num_drafts for one in rounds), initial=0))
        for _ in range(max(one.num_drafts for one in rounds)):
            leaves = [(at, node) for at, tree in enumerate(trees) for node in tree.frontier()]
            if not leaves:
                return
            paths = [trees[at].path(node) for at, node in leaves]
            contexts = [
                _pick_context(rounds[at].session, path) for (at, _), path in zip(leaves, paths, strict=True)
            ]
            rows = torch.tensor(
                [firsts[at] + len(path) for (at, _), path in zip(leaves, paths, strict=True)],
                device=self._device,
            )
            before = torch.tensor([context.token_ids[-1] for context in contexts], device=self._device)
            embeddings = weights.embed(before).to(self._dtype)
            logits = self._head.logits(states[rows] + markov.correction(prepared[rows], embeddings), weights)
            found = self._head.candidates(logits, [1] * len(leaves), contexts, weights, MAX_CHILDREN)
            for (at, node), (candidates,) in zip(leaves, found, strict=True):
                trees[at].expand(node, candidates)

    def _draft_in_order(
        self, rounds: Sequence[_Round], states: Tensor, markov: MarkovHead, weights: TargetWeights
    ) -> list[list[int]]:
        """Token by token, the rounds side by side: each pick corrects the state of the next place.

        Args:
            states: of the places that draft [num_rows, hidden_size], round after round.
        """
        prepared = markov.prepared(states)
        firsts = list(accumulate((one.num_drafts for one in rounds), initial=0))
        drafts: list[list[int]] = [[] for _ in rounds]
        running = list(range(len(rounds)))
        for step in range(max(one.num_drafts for one in rounds)):
            rows = torch.tensor([firsts[index] + step for index in running], device=self._device)
            before = [drafts[index][-1] if step else rounds[index].block[0] for index in running]
            embeddings = weights.embed(torch.tensor(before, device=self._device)).to(self._dtype)
            logits = self._head.logits(states[rows] + markov.correction(prepared[rows], embeddings), weights)
            contexts = [_pick_context(rounds[index].session, drafts[index]) for index in running]
            picks = self._head.pick(logits, [1] * len(running), contexts, weights)
            running = [
                index
                for index, (pick,), row in zip(running, picks, logits, strict=True)
                if self._head.extend(drafts[index], pick, row, rounds[index].session.min_draft_confidence)
                and step + 1 < rounds[index].num_drafts
            ]
            if not running:
                break
        return drafts

    def _num_sure(self, session: DFlashSession, logits: Tensor, draft: Sequence[int]) -> int:
        """Tokens of a draft before the first unlikely one, at least one.

        Args:
            logits: [num_drafts, draft_vocab_size].
        """
        threshold = session.min_draft_confidence
        if not threshold:
            return len(draft)
        for index, token_id in enumerate(draft):
            if self._head.confidence(logits[index], token_id) < threshold:
                return max(index, 1)
        return len(draft)


def _by_depth(places: Sequence[Candidates]) -> Callable[[Sequence[int]], Candidates]:
    """What may follow a path where that hangs on its length only."""
    return lambda path: places[len(path)]


def _checked(session: DraftSession) -> DFlashSession:
    assert isinstance(session, DFlashSession)
    return session


def _pick_context(session: DraftSession, draft: Sequence[int] = ()) -> PickContext:
    return PickContext(session.sampling, [*session.token_ids, *draft], session.prompt_length)


def _positions(runs: Iterator[tuple[int, int]], device: torch.device) -> Tensor:
    """[num_rows] the positions of several runs, one after the other."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])
