"""MTP checkpoints: Gemma 4 assistants, with a head of their own or for the target's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from drafter_service.drafters.head import Logits, read_draft_vocab
from drafter_service.drafters.kinds import context_length, kind_of, why_other
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import resolve_model
from specdec.runtime.loading import LoadedModel, load_causal_lm
from specdec.runtime.prepack import multiplier

_HEAD_WEIGHTS = {"lm_head.weight", "model.embed_tokens.weight"}


@dataclass(frozen=True, slots=True)
class Assistant:
    """An MTP checkpoint in memory."""

    loaded: LoadedModel
    draft_vocab: Tensor | None
    """Token ids [draft_vocab_size] the head covers, ascending; None: all."""
    uses_target_head: bool
    """Whether the checkpoint has no head: the target's is used."""
    max_length: int = 0
    """Longest text that it was made for, tokens; 0: its config does not say."""

    @classmethod
    def load(cls, model: str, *, dtype: str, device: str, threads: int = 0) -> Assistant:
        """Load a folder or hub id.

        Args:
            threads: CPU threads of this process's models; 0: as torch chooses.

        Raises:
            NotFoundError: there is no such checkpoint.
            InvalidArgumentError: it is not an assistant, or damaged.
        """
        folder = resolve_model(model)
        try:
            written = json.loads((folder / "config.json").read_text())
            if kind_of(written)[1] != "mtp":
                raise InvalidArgumentError(f"{folder}: {why_other(written, 'mtp')}", field="drafter")
            config = AutoConfig.from_pretrained(folder)
            max_length = context_length(written)
        except InvalidArgumentError:
            raise
        except Exception as error:  # a broken config surfaces as many types
            raise InvalidArgumentError(f"{folder}/config.json cannot be used: {error}") from error
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
        draft_vocab = read_draft_vocab(folder, vocab_size, loaded.model.device)
        return cls(loaded, draft_vocab, uses_target_head, max_length)

    def own_head(self) -> Logits | None:
        """Return the checkpoint's own head, over its draft vocabulary; None: the target's is used."""
        if self.uses_target_head:
            return None
        model: Any = self.loaded.model
        rows, draft_vocab = model.lm_head.weight, self.draft_vocab
        if model.config.use_ordered_embeddings:
            masked = model.masked_embedding
            drafted = slice(None) if draft_vocab is None else draft_vocab
            # Row by row: what transformers gives the tokens it leaves out depends on all rows of a call.
            return lambda states: torch.cat([masked(row[None, None], rows)[0] for row in states])[:, drafted]
        return multiplier(rows if draft_vocab is None else rows[draft_vocab])
