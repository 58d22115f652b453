"""Which method a request gets that names none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.request.plan import Backends
from specdec.v1 import common_pb2, drafter_pb2, target_state_pb2

NGRAM = drafter_pb2.DrafterInfo(name="ngram", family="ngram")
NGRAM_LM = drafter_pb2.DrafterInfo(
    name="ngram-lm",
    family="ngram-lm",
    model=common_pb2.ModelInfo(model_id="target", vocabulary_fingerprint="ours"),
)
FOREIGN_LM = drafter_pb2.DrafterInfo(
    name="foreign",
    family="ngram-lm",
    model=common_pb2.ModelInfo(model_id="another", vocabulary_fingerprint="theirs"),
)
LOOKUP = drafter_pb2.DrafterInfo(name="lookup", family="ngram")
SMALL = drafter_pb2.DrafterInfo(
    name="small", family="causal-lm", model=common_pb2.ModelInfo(model_id="tiny-llama")
)
MTP = drafter_pb2.DrafterInfo(
    name="mtp",
    family="mtp",
    model=common_pb2.ModelInfo(model_id="assistant"),
    target_state_spec=target_state_pb2.TargetStateSpec(),
)
DFLASH = drafter_pb2.DrafterInfo(
    name="dflash", family="dflash", target_state_spec=target_state_pb2.TargetStateSpec()
)


def backends(*drafters: drafter_pb2.DrafterInfo, default_method: str = "auto") -> Any:
    """A gateway's, whose one drafter service has these drafters; none: it was never reached."""
    infos = [drafter_pb2.DrafterServiceGetInfoResponse(drafters=drafters)] if drafters else []
    found: Any = SimpleNamespace(known_infos=infos, is_known=bool(drafters))
    unused: Any = None
    codec: Any = SimpleNamespace(vocabulary_fingerprint="ours")
    return Backends(GatewayConfig(default_method=default_method), codec, unused, found, unused)


@pytest.mark.parametrize(
    ("drafters", "expected"),
    [
        ((), "none"),
        ((NGRAM,), "ngram"),
        ((NGRAM, SMALL), "small+ngram"),
        ((SMALL, MTP), "mtp"),
        ((NGRAM, SMALL, DFLASH, MTP), "dflash+ngram"),
        ((NGRAM, DFLASH, NGRAM_LM), "dflash+ngram-lm"),
        ((NGRAM, NGRAM_LM), "ngram-lm"),
        ((FOREIGN_LM, NGRAM), "ngram"),
        ((FOREIGN_LM,), "none"),
        ((MTP, DFLASH, LOOKUP), "mtp+lookup"),
        ((NGRAM, LOOKUP), "ngram"),
    ],
)
def test_what_guesses_best_with_what_copies(
    drafters: tuple[drafter_pb2.DrafterInfo, ...], expected: str
) -> None:
    assert backends(*drafters).default_method == expected


def test_a_method_that_is_set_is_the_default_where_it_is_offered() -> None:
    assert backends(NGRAM, MTP, default_method="ngram").default_method == "ngram"
    assert backends(NGRAM, default_method="mtp").default_method == "none"
    assert backends(default_method="mtp").default_method == "mtp", "it may come up while the request runs"
