"""What a service's options may be, whatever else they say."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

from drafter_service.config import DrafterConfig
from gateway.config import GatewayConfig
from specdec.contract.errors import InvalidArgumentError
from verifier_service.config import VerifierConfig

MORE_THAN_ZERO = [
    *(
        (config, name)
        for config in (VerifierConfig, DrafterConfig)
        for name in (
            "kv_cache_mib",
            "max_sessions",
            "idle_timeout_s",
            "prefill_chunk_tokens",
            "max_batch_tokens",
        )
    ),
    (VerifierConfig, "max_draft_nodes"),
    (VerifierConfig, "max_hidden_layers"),
    (DrafterConfig, "max_draft_depth"),
    (DrafterConfig, "mirror_mib"),
    (GatewayConfig, "max_requests"),
    (GatewayConfig, "max_wait_s"),
    (GatewayConfig, "default_max_new_tokens"),
]


@pytest.mark.parametrize(("config", "name"), MORE_THAN_ZERO)
def test_what_must_be_more_than_zero(config: Any, name: str) -> None:
    assert getattr(config(**{name: 1}), name) == 1
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(InvalidArgumentError, match="--" + name.replace("_", "-")) as raised:
            config(**{name: value})
        assert raised.value.field == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *product((VerifierConfig, DrafterConfig), ("drain_grace_s", "threads")),
        (GatewayConfig, "max_waiting"),
    ],
)
def test_what_may_be_zero(config: Any, name: str) -> None:
    assert getattr(config(**{name: 0}), name) == 0
    with pytest.raises(InvalidArgumentError) as raised:
        config(**{name: -1})
    assert raised.value.field == name


@pytest.mark.parametrize("config", [VerifierConfig, DrafterConfig])
def test_threads_are_no_more_than_a_host_has_room_for(config: Any) -> None:
    assert config(threads=1024).threads == 1024
    for value in (1025, 100_000, math.nan):
        with pytest.raises(InvalidArgumentError, match=r"--threads is .*(at most|to) 1024") as raised:
            config(threads=value)
        assert raised.value.field == "threads"
