"""Configuration of the drafter service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contract.errors import InvalidArgumentError
from specdec.service.config import ModelServiceConfig, require_choice, require_not_negative, require_positive
from specdec.transport.allow_list import LOCAL, AllowList

STREAM_FEATURES = ("projected", "raw")
MTP_POSITIONS = {"anchor": 0, "hidden": -1}
"""Position of all steps of an MTP round, relative to the anchor's: transformers drafts at the anchor's
position, vLLM at the position of the hidden state that the draft starts from."""


@dataclass(frozen=True, slots=True)
class DrafterConfig(ModelServiceConfig):
    """Which drafters a process loads and how much it may use."""

    listen: str = "127.0.0.1:50052"
    """Address to serve on: host:port or unix:/path."""
    drafter: tuple[str, ...] = ("ngram",)
    """A drafter to load, [NAME=]FAMILY[:MODEL]; may be given several times. The families are "ngram" (prompt
    lookup), "ngram-lm:FOLDER-OR-HUB-ID" (prompt lookup, and a table of what the target usually says),
    "mtp:FOLDER-OR-HUB-ID" (a Gemma 4 assistant made for the target), "dflash:FOLDER-OR-HUB-ID" (a block
    diffusion drafter made for the target), "dflash2:FOLDER-OR-HUB-ID" and "dspark:FOLDER-OR-HUB-ID" (two
    kinds that have grown out of it), "eagle3:FOLDER-OR-HUB-ID" (an EAGLE-3 head made for the target) and
    "causal-lm:FOLDER-OR-HUB-ID" (a small model with the target's vocabulary). Without MODEL, "ngram-lm",
    "mtp" and "dflash" are the bundled ones for the embedded model. Requests name the drafter by NAME; without
    NAME, by FAMILY."""
    max_draft_depth: int = 64
    """Most tokens that a drafter drafts in a row in one round."""
    max_draft_nodes: int = 64
    """Most tokens of a draft tree, all branches together."""
    ngram_min: int = 1
    """Shortest n-gram that ngram and ngram-lm look up in the text, tokens; after a match of a single token,
    ngram drafts two tokens at most."""
    ngram_max: int = 4
    """Longest n-gram that ngram and ngram-lm look up in the text, tokens; longer matches are preferred."""
    ngram_memory: int = 0
    """Number of tokens of earlier answers that ngram and ngram-lm look up as well: the latest ones, of all
    callers together; 0: none. An answer is proposed only to requests with the caller and the cache salt of
    the request that it answered. Unless the gateway has --auth-tokens, all callers are one."""
    mtp_position: str = "anchor"
    """Position of an MTP drafter's steps: "anchor" is the last committed token's, as in transformers;
    "hidden" is that of the hidden state that the draft starts from, as in vLLM."""
    target: str = ""
    """The target's checkpoint, a folder or hub id. Drafters read the target's embedding and LM head from it
    where they cannot map the verifier's memory, and eagle3 the number of layers where its own config does not
    say which it reads."""
    mirror_mib: float = 1024.0
    """Memory for target state that is streamed, MiB, for all sessions together; a session that finds no room
    gets no drafts."""
    stream_features: str = "projected"
    """How hidden states are streamed to a drafter that projects them: "projected" by the verifier, which
    makes them smaller, or "raw"."""

    verifier_allow: str = LOCAL
    """Addresses of verifiers that the drafter may call for target state, separated by commas: "loopback",
    "unix" (all Unix sockets), HOST:PORT with * for any characters, NETWORK:PORT such as 10.0.0.0/8:50051, or
    dns:///NAME:PORT, which stands for the addresses that the name has. HOST or NETWORK without a port stands
    for all ports. Sessions of other verifiers get no drafts for which one would have to be called."""

    def __post_init__(self) -> None:
        # The two-argument form: with slots, super() would look for another class object.
        super(DrafterConfig, self).__post_init__()
        AllowList(self.verifier_allow)
        require_positive(self, "max_draft_depth", "max_draft_nodes", "ngram_min", "ngram_max", "mirror_mib")
        require_not_negative(self, "ngram_memory")
        require_choice(self, "stream_features", STREAM_FEATURES)
        require_choice(self, "mtp_position", tuple(MTP_POSITIONS))
        if self.ngram_max < self.ngram_min:
            raise InvalidArgumentError("--ngram-max must not be less than --ngram-min.", field="ngram_max")
        if not self.drafter:
            raise InvalidArgumentError("No drafter is given; pass --drafter ngram.", field="drafter")
