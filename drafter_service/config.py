"""Configuration of the drafter service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contract.errors import InvalidArgumentError
from specdec.service.config import ModelServiceConfig, require_choice, require_positive

STREAM_FEATURES = ("projected", "raw")
MTP_POSITIONS = {"anchor": 0, "hidden": -1}
"""The position of all steps of an MTP round, relative to the anchor's. The generator of transformers drafts
at the anchor's index, the one of vLLM at the index of the hidden state that the round starts from."""


@dataclass(frozen=True, slots=True)
class DrafterConfig(ModelServiceConfig):
    """Options of the drafter service."""

    listen: str = "127.0.0.1:50052"
    """Address to serve on: host:port or unix:/path."""
    drafter: tuple[str, ...] = ("ngram",)
    """Drafter to load, [NAME=]FAMILY[:MODEL]; may be given several times. Requests name it by NAME, or by
    FAMILY if it has no NAME. MODEL is a folder or a hub id. The families are "ngram" (prompt lookup),
    "ngram-lm:MODEL" (prompt lookup and a table of what the target usually says), "mtp:MODEL" (a Gemma 4
    assistant made for the target), "dflash:MODEL" (a block diffusion drafter made for the target) and
    "causal-lm:MODEL" (a small model with the target's vocabulary). "ngram-lm", "mtp" and "dflash" without a
    MODEL are the drafters bundled for the embedded model."""
    max_draft_depth: int = 64
    """Most tokens that a drafter drafts in a row in one round."""
    max_draft_nodes: int = 64
    """Most tokens of a draft tree, all branches together."""
    ngram_min: int = 1
    """Shortest n-gram that ngram and ngram-lm look up in the text, tokens. After a match of a single token,
    ngram drafts at most two tokens."""
    ngram_max: int = 4
    """Longest n-gram that ngram and ngram-lm look up in the text, tokens; longer matches are preferred."""
    mtp_position: str = "anchor"
    """Position at which an MTP drafter computes its steps: "anchor" is that of the last committed token, as
    in transformers; "hidden" is that of the hidden state which the steps start from, as in vLLM."""
    target: str = ""
    """The target's checkpoint, a folder or a hub id, for drafters that use the target's embedding and LM head
    and cannot map them from the verifier. Only these two tensors are read."""
    mirror_mib: float = 1024.0
    """Memory for streamed target state, MiB, all sessions together. A session that finds no room runs without
    drafts."""
    stream_features: str = "projected"
    """How hidden states are streamed to a drafter that projects them: "projected" by the verifier, which
    sends fewer bytes, or "raw"."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(DrafterConfig, self).__post_init__()
        require_positive(self, "max_draft_depth", "max_draft_nodes", "ngram_min", "mirror_mib")
        require_choice(self, "stream_features", STREAM_FEATURES)
        require_choice(self, "mtp_position", tuple(MTP_POSITIONS))
        if self.ngram_max < self.ngram_min:
            raise InvalidArgumentError("--ngram-max must not be less than --ngram-min.", field="ngram_max")
        if not self.drafter:
            raise InvalidArgumentError("No drafter is given; pass --drafter ngram.", field="drafter")
