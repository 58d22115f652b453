"""MTP drafters: Gemma 4 assistants, token by token over the target's own KV cache.

A draft step reads the target's embedding of the last token and a hidden state: the target's last one at
first, then what the step before returned. It attends over the KV of the target's last layer of each attention
type. Only committed positions are read, and the drafter has no KV of its own: all steps of a round share one
position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drafter_service.config import MTP_POSITIONS
from drafter_service.drafters.base import Drafted, Drafter, DrafterTraits, DraftItem, DraftSession
from drafter_service.drafters.growing import MAX_CHILDREN, GrowingTree, growing_tree
from drafter_service.drafters.head import DraftHead
from drafter_service.drafters.mtp.checkpoint import Assistant
from drafter_service.drafters.mtp.forward import assistant_step
from drafter_service.drafters.mtp.rounds import AssistantRound, SideBySide
from specdec.contract.draft_tree import ANCHOR
from specdec.contract.errors import SpecdecError
from specdec.contract.target_state import TargetStateSpec
from specdec.runtime.memory import dtype_name
from specdec.state.view import TargetStateView
from specdec.state.weights import TargetWeights

DEFAULT_DRAFT_DEPTH = 4


class MtpDrafter(Drafter):
    """Drafts for all sessions of a step side by side: a session is a row.

    Args:
        position: where the steps of a round stand, a key of MTP_POSITIONS.
    """

    def __init__(
        self,
        name: str,
        assistant: Assistant,
        *,
        max_draft_depth: int,
        max_draft_nodes: int = 64,
        position: str = "anchor",
    ) -> None:
        model: Any = assistant.loaded.model
        config = model.config.get_text_config()
        self._dtype, self._device = model.dtype, model.device
        self._backbone_size: int = model.config.backbone_hidden_size
        self._kv_shapes = {
            layer.self_attn.layer_type: (
                config.num_attention_heads // layer.self_attn.num_key_value_groups,
                layer.self_attn.head_dim,
            )
            for layer in model.model.layers
        }
        self._offset = MTP_POSITIONS[position]
        self._head = DraftHead(
            assistant.draft_vocab, assistant.own_head(), self._dtype, vocab_size=config.vocab_size
        )
        # Only the layers and projections of the model are used from here on.
        model.lm_head = model.model.embed_tokens = nn.Identity()
        self._layers = assistant_step(model)
        self.traits = DrafterTraits(
            name=name,
            family="mtp",
            max_draft_depth=max_draft_depth,
            max_draft_nodes=max_draft_nodes,
            default_draft_depth=min(DEFAULT_DRAFT_DEPTH, max_draft_depth),
            model_id=assistant.loaded.model_id,
            revision=assistant.loaded.revision,
            vocabulary_fingerprint=assistant.loaded.vocabulary_fingerprint,
            vocab_size=config.vocab_size,
            max_length=assistant.max_length,
            dtype=dtype_name(self._dtype),
            device=str(self._device),
            target_state_spec=TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True),
            needs_target_weights=True,
        )

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        """Draft up to K tokens in a row; the sessions of one target take their steps together."""
        return self.propose_by_target(items, self._start, self._draft)

    def _start(self, item: DraftItem) -> AssistantRound | None:
        """Prepare a session's draft; None: its generation is full.

        Raises:
            FailedPreconditionError: the assistant cannot draft from the target's state.
        """
        session, view = item.session, item.session.view
        num_wanted = min(item.draft_depth, session.max_length - len(session.token_ids))
        assert view is not None
        kv = {kind: view.kv(_layer_of(view, kind)) for kind in self._kv_shapes}
        # The slice is empty where there is no position yet, which is refused first.
        hidden = view.last_hidden(max(view.length - 1, 0), view.length)
        self.refuse_misfit(session, lambda: self._misfit(session, kv, hidden))
        if num_wanted <= 0:
            return None
        return AssistantRound(
            session,
            num_wanted,
            {kind: (keys.to(self._dtype), values.to(self._dtype)) for kind, (keys, values) in kv.items()},
            hidden.to(self._dtype),
            growing_tree(item, num_wanted) if item.wants_tree else None,
        )

    def _misfit(self, session: DraftSession, kv: Mapping[str, tuple[Tensor, Tensor]], hidden: Tensor) -> str:
        """Say what of the target has another size than the assistant reads; empty: everything fits."""
        assert session.target_weights is not None
        for kind, shape in self._kv_shapes.items():
            for states in kv[kind]:
                if (found := tuple(states.shape[1:])) != shape:
                    return f"it reads {kind} KV of (heads, dimensions) {shape}, the target's is {found}"
        weights = session.target_weights
        for what, rows in (("hidden states", hidden), ("embeddings", weights.embedding)):
            if tuple(rows.shape[1:]) != (self._backbone_size,):
                size = "x".join(map(str, rows.shape[1:]))
                return f"it reads {what} of {self._backbone_size} elements, the target's have {size}"
        return self._head.misfit(weights)

    def _draft(self, rounds: Sequence[AssistantRound]) -> list[Drafted]:
        """Draft step by step, chains and trees apart: a chain's bits are the same as without any tree."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        if chains := [part for part in rounds if part.tree is None]:
            self._draft_chains(SideBySide.of(chains, weights))
        if growing := [part for part in rounds if part.tree]:
            self._grow_trees(SideBySide.of(growing, weights), [part.tree for part in growing if part.tree])
        return [part.tree.tree() if part.tree else part.draft for part in rounds]

    def _draft_chains(self, group: SideBySide) -> None:
        """Draft chains, a row for each; rounds leave when they have K tokens, or a token is unlikely."""
        running = list(range(len(group.rounds)))
        hidden = torch.cat([part.hidden for part in group.rounds])
        while running:
            token_ids = [group.rounds[at].last_token for at in running]
            logits, hidden = self._step(group, running, [1] * len(running), token_ids, hidden)
            going_on = self._extend([group.rounds[at] for at in running], logits, group.weights)
            running = [running[row] for row in going_on]
            if len(going_on) < len(hidden):
                hidden = hidden[going_on]

    def _grow_trees(self, group: SideBySide, trees: Sequence[GrowingTree]) -> None:
        """Expand the likeliest leaves of every tree step by step: a branch is just a row."""
        after: list[dict[int, Tensor]] = [{} for _ in trees]
        """What the step that expanded a node returned [backbone_hidden_size], by node, for each round."""
        for _ in range(max(part.num_wanted for part in group.rounds)):
            frontiers = [tree.frontier() for tree in trees]
            going_on = [at for at, nodes in enumerate(frontiers) if nodes]
            if not going_on:
                return
            rows = [(at, node) for at in going_on for node in frontiers[at]]
            contexts = [group.rounds[at].context(trees[at].path(node)) for at, node in rows]
            hidden = [
                group.rounds[at].hidden[0] if node == ANCHOR else after[at][trees[at].parent(node)]
                for at, node in rows
            ]
            counts = [len(frontiers[at]) for at in going_on]
            token_ids = [context.token_ids[-1] for context in contexts]
            logits, returned = self._step(group, going_on, counts, token_ids, torch.stack(hidden))
            found = self._head.candidates(logits, [1] * len(rows), contexts, group.weights, MAX_CHILDREN)
            for (at, node), (candidates,), state in zip(rows, found, returned, strict=True):
                trees[at].expand(node, candidates)
                after[at][node] = state

    def _step(
        self,
        group: SideBySide,
        running: Sequence[int],
        counts: Sequence[int],
        token_ids: Sequence[int],
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Take one draft step.

        Args:
            running: which rounds of the group take it, ascending.
            counts: number of rows of each of these.
            token_ids: each row's last token.
            hidden: what each row's last step returned [num_rows, backbone_hidden_size].

        Returns:
            Logits [num_rows, draft_vocab_size] and hidden states [num_rows, backbone_hidden_size].
        """
        positions = [
            len(group.rounds[at].session.token_ids) - 1 + self._offset
            for at, count in zip(running, counts, strict=True)
            for _ in range(count)
        ]
        kv = {kind: group.kv[kind].of(running, counts) for kind in self._kv_shapes}
        embeddings = group.weights.embed(torch.tensor(token_ids, device=self._device)).to(self._dtype)
        states, hidden = self._layers.step(embeddings, hidden, positions, kv)
        return self._head.logits(states, group.weights), hidden

    def _extend(self, rounds: Sequence[AssistantRound], logits: Tensor, weights: TargetWeights) -> list[int]:
        """Append a pick to each draft; return the rows that need another step.

        Args:
            logits: [num_rows, draft_vocab_size].
        """
        contexts = [part.context(part.draft) for part in rounds]
        picks = self._head.pick(logits, [1] * len(rounds), contexts, weights)
        going_on = []
        for row, (part, (pick,)) in enumerate(zip(rounds, picks, strict=True)):
            is_sure = self._head.extend(part.draft, pick, logits[row], part.confidence)
            if is_sure and len(part.draft) < part.num_wanted:
                going_on.append(row)
        return going_on


def _layer_of(view: TargetStateView, attention_type: str) -> int:
    """Return the target layer to read for an attention type; where the target lacks it, its last layer."""
    if attention_type in view.attention_types:
        return view.last_layer_of(attention_type)
    return max(view.last_layer_of(kind) for kind in view.attention_types)
