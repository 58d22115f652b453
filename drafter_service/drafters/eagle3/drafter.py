"""EAGLE-3 drafters (arXiv 2503.01840): a decoder layer over tokens and the target's features, token by token.

A pair is the feature of a position, made of hidden states of a few of the target's layers, and the token
after it. The drafter keeps keys and values of the pairs of all committed positions. The last pair gives the
first draft; each further step takes the draft token and, in place of a feature, what the step before
returned. The keys and values of steps lie behind the pairs, and the next round writes over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
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
from drafter_service.drafters.eagle3.checkpoint import EagleCheckpoint
from drafter_service.drafters.eagle3.layers import EagleForward, PairKv, rows_of_pairs, rows_of_steps
from drafter_service.drafters.eagle3.rounds import Branch, EagleRound
from drafter_service.drafters.growing import MAX_CHILDREN, GrowingTree, growing_tree
from drafter_service.drafters.head import DraftHead
from specdec.contract.draft_tree import ANCHOR
from specdec.contract.errors import SpecdecError
from specdec.contract.target_state import TargetStateSpec
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.kv_slots import device_slots, join_slots
from specdec.runtime.memory import dtype_name
from specdec.runtime.prepack import multiplier
from specdec.state.view import TargetStateView
from specdec.state.weights import TargetWeights

DEFAULT_DRAFT_DEPTH = 4


class EagleDrafter(Drafter):
    """Drafts for all sessions of a step side by side: a session has a row for each branch."""

    def __init__(
        self,
        name: str,
        checkpoint: EagleCheckpoint,
        *,
        kv_budget_bytes: int,
        max_draft_depth: int,
        max_draft_nodes: int = 64,
    ) -> None:
        settings, features = checkpoint.settings, checkpoint.features
        config: Any = checkpoint.decoder.config
        self._settings, self._features, self._embedding = settings, features, checkpoint.embedding
        parameter = next(checkpoint.decoder.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        self._size: int = config.hidden_size
        self._project = None if features.fc is None else multiplier(features.fc)
        own = None if checkpoint.lm_head is None else multiplier(checkpoint.lm_head)
        self._head = DraftHead(checkpoint.draft_vocab, own, self._dtype, vocab_size=settings.vocab_size)
        self._forward = EagleForward(checkpoint.decoder, norm_before_residual=settings.norm_before_residual)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = KvShape(config.num_key_value_heads, head_dim, head_dim)
        self.kv_pool = self._pool = KvPool(
            dict.fromkeys(range(config.num_hidden_layers), shape),
            budget_bytes=kv_budget_bytes,
            dtype=self._dtype,
            device=self._device,
        )
        self.traits = DrafterTraits(
            name=name,
            family="eagle3",
            max_draft_depth=max_draft_depth,
            max_draft_nodes=max_draft_nodes,
            default_draft_depth=min(DEFAULT_DRAFT_DEPTH, max_draft_depth),
            model_id=checkpoint.model_id,
            revision=checkpoint.revision,
            vocab_size=settings.vocab_size,
            max_length=checkpoint.max_length,
            dtype=dtype_name(self._dtype),
            device=str(self._device),
            target_state_spec=TargetStateSpec(
                hidden_layer_ids=settings.layer_ids, last_hidden_state=not settings.layer_ids
            ),
            needs_target_weights=True,
        )

    def open(self, request: OpenDraft) -> CachedSession:
        """Open a session with room for its pairs, and for a round's steps behind them.

        Raises:
            InvalidArgumentError: the generation is longer than the pool.
            ResourceExhaustedError: all memory is in use.
        """
        return CachedSession(request, self._pool.allocate(request.max_length + self._most_steps))

    @property
    def _most_steps(self) -> int:
        return max(self.traits.max_draft_depth, self.traits.max_draft_nodes)

    def close(self, session: DraftSession) -> None:
        """Give the session's memory back."""
        self._pool.free(_checked(session).allocation)

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        """Draft up to K tokens in a row; the sessions of one target take their steps together."""
        return self.propose_by_target(items, self._start, self._draft)

    def _start(self, item: DraftItem) -> EagleRound | None:
        """Prepare a session's draft; None: its pairs were read, or its generation is full.

        Raises:
            FailedPreconditionError: the drafter cannot follow the target.
        """
        session = _checked(item.session)
        view, weights = session.view, session.target_weights
        assert view is not None
        assert weights is not None
        self.refuse_misfit(session, lambda: self._misfit(view, weights))
        if not item.draft_depth:
            stop = session.num_cached + min(item.num_tokens, session.num_prefill_tokens)
            self._read([session], [stop])
            return None
        num_wanted = min(item.draft_depth, session.max_length - len(session.token_ids))
        if num_wanted <= 0:
            return None
        tree = growing_tree(item, num_wanted) if item.wants_tree else None
        return EagleRound(session, view.length, num_wanted, self._most_steps, tree)

    def _misfit(self, view: TargetStateView, weights: TargetWeights) -> str:
        """Say what of the target has another size than the drafter reads; empty: everything fits."""
        count = max(1, len(self._settings.layer_ids))
        size = self._size if self._features.fc is None else self._features.fc.shape[1] // count
        found = self._states(view, 0, 1)[0].shape[1]
        if found != size:
            return f"it reads hidden states of {size} elements, the target's have {found}"
        if self._embedding is None and weights.embedding.shape[1] != self._size:
            found = weights.embedding.shape[1]
            return f"it reads embeddings of {self._size} elements, the target's have {found}"
        return self._head.misfit(weights)

    def _states(self, view: TargetStateView, start: int, stop: int) -> list[Tensor]:
        """Return the target's hidden states that features are made of, by layer [positions, size]."""
        if not self._settings.layer_ids:
            return [view.last_hidden(start, stop)]
        return [view.hidden(layer_id, start, stop) for layer_id in self._settings.layer_ids]

    def _features_of(self, view: TargetStateView, start: int, stop: int) -> Tensor:
        """Return the features of positions [positions, hidden_size]."""
        parts = [states.to(self._dtype) for states in self._states(view, start, stop)]
        if self._features.each:
            parts = [norm(states) for norm, states in zip(self._features.each, parts, strict=True)]
        features = torch.cat(parts, dim=-1)
        if self._features.before is not None:
            features = self._features.before(features)
        return features if self._project is None else self._project(features)

    def _read(self, sessions: Sequence[CachedSession], stops: Sequence[int]) -> list[Tensor]:
        """Make keys and values of pairs up to a position each; return each session's last output."""
        token_ids, features, positions, rows, slots = list[int](), list[Tensor](), list[Tensor](), [], []
        for session, stop in zip(sessions, stops, strict=True):
            # A round that is asked for again reads its last pair again: drafting begins with what that gives.
            view, start = session.view, min(session.num_cached, stop - 1)
            assert view is not None
            rows.append(rows_of_pairs(session.allocation, start, stop, len(token_ids)))
            slots.append(session.allocation.host_slots(start, stop))
            token_ids += session.token_ids[start + 1 : stop + 1]
            features.append(self._features_of(view, start, stop))
            positions.append(torch.arange(start, stop, device=self._device))
        kv = PairKv(
            self._pool,
            [session.allocation for session in sessions],
            rows,
            device_slots(join_slots(slots), self._device),
        )
        weights = sessions[0].target_weights
        assert weights is not None
        outputs = self._forward(
            self._embed(token_ids, weights), torch.cat(features), torch.cat(positions), kv
        )
        for session, stop in zip(sessions, stops, strict=True):
            session.num_cached = stop
        counts = [len(own.rows) for own in rows]
        return [own[-1] for own in outputs.split(counts)]

    def _embed(self, token_ids: Sequence[int], weights: TargetWeights) -> Tensor:
        table = weights.embedding if self._embedding is None else self._embedding
        return embedding(torch.tensor(token_ids, device=self._device), table).to(self._dtype)

    def _draft(self, rounds: Sequence[EagleRound]) -> list[Drafted]:
        """Draft from the last pair of each session, chains and trees apart."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        outputs = self._read([part.session for part in rounds], [part.num_pairs for part in rounds])
        firsts = [Branch(output, ()) for output in outputs]
        chains = [index for index, part in enumerate(rounds) if part.tree is None]
        self._draft_chains([rounds[at] for at in chains], [firsts[at] for at in chains], weights)
        trees = [(rounds[at], firsts[at], tree) for at, part in enumerate(rounds) if (tree := part.tree)]
        self._grow_trees(trees, weights)
        return [part.tree.tree() if part.tree else part.draft for part in rounds]

    def _logits(self, branches: Sequence[Branch], weights: TargetWeights) -> Tensor:
        """Return the logits of what follows branches [num_branches, draft_vocab_size]."""
        outputs = torch.stack([branch.feature for branch in branches])
        return self._head.logits(self._forward.norm(outputs), weights)

    def _draft_chains(
        self, rounds: Sequence[EagleRound], branches: Sequence[Branch], weights: TargetWeights
    ) -> None:
        """Draft chains, a row for each; rounds leave when they have K tokens, or a token is unlikely."""
        running = list(zip(rounds, branches, strict=True))
        while running:
            logits = self._logits([branch for _, branch in running], weights)
            contexts = [part.context(part.draft) for part, _ in running]
            picks = self._head.pick(logits, [1] * len(running), contexts, weights)
            going_on = []
            for row, ((part, branch), (pick,)) in enumerate(zip(running, picks, strict=True)):
                is_sure = self._head.extend(part.draft, pick, logits[row], part.confidence)
                if is_sure and len(part.draft) < part.num_wanted:
                    going_on.append((part, branch))
            if not going_on:
                return
            parts = [part for part, _ in going_on]
            stepped = self._step(
                parts, [[branch] for _, branch in going_on], [[part.draft[-1]] for part in parts], weights
            )
            running = [(part, branch) for part, (branch,) in zip(parts, stepped, strict=True)]

    def _grow_trees(
        self, growing: Sequence[tuple[EagleRound, Branch, GrowingTree]], weights: TargetWeights
    ) -> None:
        """Expand the likeliest leaves of every tree step by step: a branch is just a row."""
        behind: list[dict[int, Branch]] = [{ANCHOR: first} for _, first, _ in growing]
        """What a step over a node returned, by node, for each round; of the anchor it is the last pair's."""
        if growing:
            self._expand(growing, behind, [(at, ANCHOR) for at in range(len(growing))], weights)
        for _ in range(max((part.num_wanted for part, _, _ in growing), default=0) - 1):
            frontiers = [tree.frontier()[: part.most_steps - part.num_steps] for part, _, tree in growing]
            active = [(at, nodes) for at, nodes in enumerate(frontiers) if nodes]
            if not active:
                return
            stepped = self._step(
                [growing[at][0] for at, _ in active],
                [[behind[at][growing[at][2].parent(node)] for node in nodes] for at, nodes in active],
                [[growing[at][2].path(node)[-1] for node in nodes] for at, nodes in active],
                weights,
            )
            for (at, nodes), branches in zip(active, stepped, strict=True):
                behind[at].update(zip(nodes, branches, strict=True))
            self._expand(growing, behind, [(at, node) for at, nodes in active for node in nodes], weights)

    def _expand(
        self,
        growing: Sequence[tuple[EagleRound, Branch, GrowingTree]],
        behind: Sequence[Mapping[int, Branch]],
        leaves: Sequence[tuple[int, int]],
        weights: TargetWeights,
    ) -> None:
        """Let the likeliest tokens follow leaves, each of a round and its node."""
        logits = self._logits([behind[at][node] for at, node in leaves], weights)
        contexts = [growing[at][0].context(growing[at][2].path(node)) for at, node in leaves]
        found = self._head.candidates(logits, [1] * len(leaves), contexts, weights, MAX_CHILDREN)
        for (at, node), (candidates,) in zip(leaves, found, strict=True):
            growing[at][2].expand(node, candidates)

    def _step(
        self,
        rounds: Sequence[EagleRound],
        branches: Sequence[Sequence[Branch]],
        token_ids: Sequence[Sequence[int]],
        weights: TargetWeights,
    ) -> list[list[Branch]]:
        """Take a step over tokens, each behind a branch of its round; return where they lead.

        Args:
            branches: for each round, what led to its tokens.
            token_ids: for each round, the tokens.
        """
        rows, slots, positions, paths = [], [], list[int](), list[list[tuple[int, ...]]]()
        num_rows = 0
        for part, own in zip(rounds, branches, strict=True):
            reached = [(*branch.path, part.next_place()) for branch in own]
            allocation = part.session.allocation
            rows.append(rows_of_steps(allocation, part.num_pairs, reached, num_rows))
            places = numpy.array([path[-1] for path in reached], dtype=numpy.int64)
            slots.append(allocation.host_slots_at(places))
            positions += [part.num_pairs - 1 + len(path) for path in reached]
            paths.append(reached)
            num_rows += len(reached)
        kv = PairKv(
            self._pool,
            [part.session.allocation for part in rounds],
            rows,
            device_slots(join_slots(slots), self._device),
        )
        outputs = self._forward(
            self._embed([token for own in token_ids for token in own], weights),
            self._recurring([branch.feature for own in branches for branch in own]),
            torch.tensor(positions, device=self._device),
            kv,
        )
        by_round = outputs.split([len(own) for own in paths])
        return [
            [Branch(output, path) for output, path in zip(found, reached, strict=True)]
            for found, reached in zip(by_round, paths, strict=True)
        ]

    def _recurring(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return what goes into a step in place of features, of outputs [hidden_size] of the step before."""
        stacked = torch.stack(list(outputs))
        return self._forward.norm(stacked) if self._settings.norm_output else stacked


def _checked(session: DraftSession) -> CachedSession:
    assert isinstance(session, CachedSession)
    return session
