"""MTP drafters: Gemma 4 assistants, token by token over the target's own KV cache.

A draft step reads the target's embedding of the last token and a hidden state, the target's last one at
first, then what the step before returned; it attends over the KV of the target's last layer of each
attention type. Nothing but committed positions is read, and there is no KV of the drafter's own: all steps
of a round share one position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from drafter_service.config import MTP_POSITIONS
from drafter_service.drafters.base import Drafted, Drafter, DrafterTraits, DraftItem, DraftSession
from drafter_service.drafters.growing import MAX_CHILDREN, GrowingTree, growing_tree
from drafter_service.drafters.head import DraftHead, Logits, read_draft_vocab
from drafter_service.drafters.mtp.layers import AssistantLayers
from specdec.contract.draft_tree import ANCHOR
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError, SpecdecError
from specdec.contract.target_state import TargetStateSpec
from specdec.models.files import resolve_model
from specdec.runtime.loading import LoadedModel, load_causal_lm
from specdec.runtime.memory import dtype_name
from specdec.runtime.picks import PickContext
from specdec.runtime.prepack import multiplier, prepack_linears
from specdec.state.view import TargetStateView
from specdec.state.weights import TargetWeights

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
DEFAULT_NUM_DRAFT_TOKENS = 4
_HEAD_WEIGHTS = {"lm_head.weight", "model.embed_tokens.weight"}


@dataclass(frozen=True, slots=True)
class Assistant:
    """A checkpoint in memory."""

    loaded: LoadedModel
    draft_vocab: Tensor | None
    """Token ids [draft_vocab_size] the head covers, ascending; None: all."""
    uses_target_head: bool
    """The checkpoint has no head: the target's is used."""

    @classmethod
    def load(cls, model: str, *, dtype: str, device: str, threads: int = 0) -> Assistant:
        """Load a folder or hub id.

        Raises:
            NotFoundError: there is no such checkpoint.
            InvalidArgumentError: it is no assistant, or damaged.
        """
        from transformers import AutoConfig

        folder = resolve_model(model)
        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # a broken config surfaces as many types
            raise InvalidArgumentError(f"{folder}/config.json cannot be used: {error}") from error
        if config.model_type not in MODEL_TYPES:
            raise InvalidArgumentError(
                f"{folder} holds a {config.model_type!r} model; the mtp drafter runs "
                f"{' and '.join(MODEL_TYPES)}.",
                field="drafter",
            )
        uses_target_head = bool(getattr(config, "specdec_target_head", False))
        loaded = load_causal_lm(
            model,
            dtype=dtype,
            device=device,
            threads=threads,
            optional_weights=_HEAD_WEIGHTS if uses_target_head else frozenset(),
        )
        if not (folder / "tokenizer.json").is_file():
            fingerprint = getattr(config, "specdec_vocabulary_fingerprint", "")
            loaded = replace(loaded, vocabulary_fingerprint=fingerprint)
        vocab_size = config.get_text_config().vocab_size
        return cls(loaded, read_draft_vocab(folder, vocab_size, loaded.model.device), uses_target_head)


@dataclass(frozen=True, slots=True, eq=False)
class _SessionKv:
    """Committed keys and values of one attention type, session by session."""

    kv: Sequence[tuple[Tensor, Tensor]]  # per session [length, num_kv_heads, head_dim]
    counts: Sequence[int]
    """Rows of queries of each session."""

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attention of queries [num_heads, num_rows, head_dim], over views of the target's memory."""
        # As transformers masks it: the window reaches back from the last committed key, that one included.
        first = 0 if sliding_window is None else -sliding_window - 1
        rows = []
        for (keys, values), own in zip(self.kv, queries.split(list(self.counts), dim=1), strict=True):
            # Rows of a session, and heads that share keys, are queries of one attention.
            folded = own.reshape(1, keys.shape[1], -1, queries.shape[-1])
            attended = scaled_dot_product_attention(
                folded,
                keys[first:].transpose(0, 1)[None],
                values[first:].transpose(0, 1)[None],
                scale=scaling,
            )
            rows.append(attended.reshape(*own.shape[:2], -1))
        return torch.cat(rows, dim=1)


@dataclass(slots=True, eq=False)
class _Round:
    """One session's draft in the making."""

    session: DraftSession
    num_wanted: int
    kv: Mapping[str, tuple[Tensor, Tensor]]
    """By attention type [length, num_kv_heads, head_dim]."""
    hidden: Tensor  # [1, backbone_hidden_size]
    tree: GrowingTree | None = None
    """The draft where a tree is wanted."""
    draft: list[int] = field(default_factory=list)

    @property
    def last_token(self) -> int:
        return self.draft[-1] if self.draft else self.session.token_ids[-1]

    @property
    def context(self) -> PickContext:
        return PickContext(
            self.session.sampling, [*self.session.token_ids, *self.draft], self.session.prompt_length
        )


class MtpDrafter(Drafter):
    """Drafts for all sessions of a step side by side: a session is a row.

    Args:
        position: a key of MTP_POSITIONS.
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
        own_head = None if assistant.uses_target_head else _own_head(model, assistant.draft_vocab)
        self._head = DraftHead(assistant.draft_vocab, own_head, self._dtype, vocab_size=config.vocab_size)
        # What is left of the model is its layers and projections.
        model.lm_head = model.model.embed_tokens = nn.Identity()
        prepack_linears(model, keep=model.lm_head)
        self._layers = AssistantLayers(model)
        self.traits = DrafterTraits(
            name=name,
            family="mtp",
            max_draft_depth=max_draft_depth,
            max_draft_nodes=max_draft_nodes,
            default_draft_depth=min(DEFAULT_NUM_DRAFT_TOKENS, max_draft_depth),
            model_id=assistant.loaded.model_id,
            revision=assistant.loaded.revision,
            vocabulary_fingerprint=assistant.loaded.vocabulary_fingerprint,
            vocab_size=config.vocab_size,
            dtype=dtype_name(self._dtype),
            device=str(self._device),
            target_state_spec=TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True),
            needs_target_weights=True,
        )

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        """Drafts of up to K tokens in a row; the sessions of one target take their steps together."""
        return self.propose_by_target(items, self._start, self._draft)

    def _start(self, item: DraftItem) -> _Round | None:
        """A session's draft to be; None: no more fits into the generation.

        Raises:
            FailedPreconditionError: the assistant cannot draft from the target's state.
        """
        session = item.session
        num_wanted = min(item.draft_depth, session.max_length - len(session.token_ids))
        assert session.view is not None
        kv = {kind: session.view.kv(_layer_of(session.view, kind)) for kind in self._kv_shapes}
        length = session.view.length
        if not length:
            raise FailedPreconditionError(
                f"{self.traits.name} drafts from the target's state of at least one position.",
                reason="NO_TARGET_STATE",
            )
        hidden = session.view.last_hidden(length - 1, length)
        if misfit := self._misfit(session, kv, hidden):
            raise FailedPreconditionError(
                f"{self.traits.name} was made for another target: {misfit}.", reason="DRAFTER_MISFIT"
            )
        if num_wanted <= 0:
            return None
        return _Round(
            session,
            num_wanted,
            {kind: (keys.to(self._dtype), values.to(self._dtype)) for kind, (keys, values) in kv.items()},
            hidden.to(self._dtype),
            growing_tree(item, num_wanted) if item.wants_tree else None,
        )

    def _misfit(self, session: DraftSession, kv: Mapping[str, tuple[Tensor, Tensor]], hidden: Tensor) -> str:
        """What of the target is of another size than the assistant reads; empty: nothing."""
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

    def _draft(self, rounds: Sequence[_Round]) -> list[Drafted]:
        """Step by step, chains and trees apart: a chain's bits are what they are without any tree."""
        weights = rounds[0].session.target_weights
        assert weights is not None
        self._draft_chains([one for one in rounds if one.tree is None], weights)
        self._grow_trees([(one, one.tree) for one in rounds if one.tree], weights)
        return [one.tree.tree() if one.tree else one.draft for one in rounds]

    def _draft_chains(self, running: Sequence[_Round], weights: TargetWeights) -> None:
        """A row each; rounds leave when they have their K tokens, or stop being sure."""
        hidden = torch.cat([one.hidden for one in running]) if running else torch.empty(0)
        while running:
            token_ids = [one.last_token for one in running]
            logits, hidden = self._step(running, [1] * len(running), token_ids, hidden, weights)
            going_on = self._extend(running, logits, weights)
            running = [running[row] for row in going_on]
            if len(going_on) < len(hidden):
                hidden = hidden[going_on]

    def _grow_trees(self, growing: Sequence[tuple[_Round, GrowingTree]], weights: TargetWeights) -> None:
        """Each step expands the likeliest leaves of every tree: a branch is just a row."""
        after: list[dict[int, Tensor]] = [{} for _ in growing]
        """Per round, what the step that expanded a node returned [backbone_hidden_size]."""
        for _ in range(max((one.num_wanted for one, _ in growing), default=0)):
            frontiers = [tree.frontier() for _, tree in growing]
            going_on = [at for at, nodes in enumerate(frontiers) if nodes]
            if not going_on:
                return
            rows = [(at, node) for at in going_on for node in frontiers[at]]
            contexts = [_context_of(*growing[at], node) for at, node in rows]
            hidden = [
                growing[at][0].hidden[0] if node == ANCHOR else after[at][growing[at][1].parent(node)]
                for at, node in rows
            ]
            logits, returned = self._step(
                [growing[at][0] for at in going_on],
                [len(frontiers[at]) for at in going_on],
                [context.token_ids[-1] for context in contexts],
                torch.stack(hidden),
                weights,
            )
            found = self._head.candidates(logits, [1] * len(rows), contexts, weights, MAX_CHILDREN)
            for (at, node), (candidates,), state in zip(rows, found, returned, strict=True):
                growing[at][1].expand(node, candidates)
                after[at][node] = state

    def _step(
        self,
        rounds: Sequence[_Round],
        counts: Sequence[int],
        token_ids: Sequence[int],
        hidden: Tensor,
        weights: TargetWeights,
    ) -> tuple[Tensor, Tensor]:
        """One draft step.

        Args:
            counts: rows of each round.
            token_ids: each row's last token.
            hidden: what each row's last step returned [num_rows, backbone_hidden_size].

        Returns:
            Logits [num_rows, draft_vocab_size] and hidden states [num_rows, backbone_hidden_size].
        """
        positions = [
            len(one.session.token_ids) - 1 + self._offset
            for one, count in zip(rounds, counts, strict=True)
            for _ in range(count)
        ]
        kv = {kind: _SessionKv([one.kv[kind] for one in rounds], counts) for kind in self._kv_shapes}
        embeddings = weights.embed(torch.tensor(token_ids, device=self._device)).to(self._dtype)
        states, hidden = self._layers.step(
            embeddings, hidden, torch.tensor(positions, device=self._device), kv
        )
        return self._head.logits(states, weights), hidden

    def _extend(self, rounds: Sequence[_Round], logits: Tensor, weights: TargetWeights) -> list[int]:
        """Append a pick to each draft; the rows that need another step.

        Args:
            logits: [num_rows, draft_vocab_size].
        """
        contexts = [one.context for one in rounds]
        picks = self._head.pick(logits, [1] * len(rounds), contexts, weights)
        going_on = []
        for row, (one, (pick,)) in enumerate(zip(rounds, picks, strict=True)):
            threshold = one.session.min_draft_confidence
            is_sure = self._head.extend(one.draft, pick, logits[row], threshold)
            if is_sure and len(one.draft) < one.num_wanted:
                going_on.append(row)
        return going_on


def _context_of(one: _Round, tree: GrowingTree, node: int) -> PickContext:
    """What picks after a node depend on."""
    session = one.session
    return PickContext(session.sampling, [*session.token_ids, *tree.path(node)], session.prompt_length)


def _own_head(model: Any, draft_vocab: Tensor | None) -> Logits:
    rows = model.lm_head.weight
    if model.config.use_ordered_embeddings:
        masked = model.masked_embedding
        drafted = slice(None) if draft_vocab is None else draft_vocab
        # Row by row: what transformers gives the tokens it leaves out depends on all rows of a call.
        return lambda states: torch.cat([masked(row[None, None], rows)[0] for row in states])[:, drafted]
    return multiplier(rows if draft_vocab is None else rows[draft_vocab])


def _layer_of(view: TargetStateView, attention_type: str) -> int:
    """The layer whose KV layers of an attention type read; that of another type if the target has no such."""
    if attention_type in view.attention_types:
        return view.last_layer_of(attention_type)
    return max(view.last_layer_of(kind) for kind in view.attention_types)
