"""Peers that break the protocol: messages out of order, other vocabularies, bytes that are not a message."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from gateway.config import GatewayConfig
from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
    from_rpc_error,
)
from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.transport.channel import MAX_MESSAGE_BYTES, aio_channel
from specdec.transport.handshake import make_handshake
from specdec.v1 import common_pb2, drafter_pb2, target_state_pb2, verifier_pb2
from tests.raw_streams import draft_stream, verify_stream
from tests.refusals import (
    PROMPT,
    ask,
    assert_healthy,
    assert_refusal,
    generate_request,
    sampling,
    shared,
    shown,
)
from tests.systems import System
from tests.tiny_models import VOCAB_SIZE

OTHER_VOCABULARY = "0" * 64
BAD_UTF8 = b"\xff\xfe"

OPEN = verifier_pb2.VerifyRequest(
    open=verifier_pb2.VerifyOpen(handshake=make_handshake(), committed_token_ids=PROMPT, max_new_tokens=8)
)


@shared
@pytest.mark.parametrize(
    ("request_", "error", "reason", "fragment"),
    [
        (OPEN, FailedPreconditionError, "SECOND_OPEN", "opened once"),
        (
            {"base_committed_length": len(PROMPT)},
            FailedPreconditionError,
            "STALE_BASE",
            f"committed {len(PROMPT) + 1}",
        ),
        ({"base_committed_length": 10**9}, FailedPreconditionError, "STALE_BASE", "nothing was changed"),
        (
            {"base_committed_length": len(PROMPT) + 1, "draft_token_ids": [5, 6], "parent_indices": [-1, 1]},
            InvalidArgumentError,
            "NO_DRAFT_TREE",
            "earlier token",
        ),
        (
            {"base_committed_length": len(PROMPT) + 1, "draft_token_ids": [5, 5], "parent_indices": [-1, -1]},
            InvalidArgumentError,
            "NO_DRAFT_TREE",
            "same token",
        ),
        (
            {"base_committed_length": len(PROMPT) + 1, "draft_token_ids": [5, 6], "parent_indices": [-1]},
            InvalidArgumentError,
            "NO_DRAFT_TREE",
            "one index for each",
        ),
        (
            {"base_committed_length": len(PROMPT) + 1, "draft_token_ids": [VOCAB_SIZE]},
            InvalidArgumentError,
            "TOKEN_ID_OUT_OF_RANGE",
            str(VOCAB_SIZE),
        ),
        (
            {"base_committed_length": len(PROMPT) + 1, "draft_token_ids": [5] * 65},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "at most 64",
        ),
    ],
    ids=[
        "second open",
        "stale base",
        "base ahead",
        "parent",
        "siblings",
        "parents",
        "token id",
        "K above the limit",
    ],
)
async def test_verify_stream_refuses_a_second_message(
    request_: Any, error: type[SpecdecError], reason: str, fragment: str, small: System
) -> None:
    if isinstance(request_, dict):
        request_ = verifier_pb2.VerifyRequest(round=verifier_pb2.VerifyRound(**request_))
    async with verify_stream(small.verifier_address) as stream:
        await stream.open(PROMPT)
        with pytest.raises(error, match=fragment) as raised:
            await stream.ask(request_)
    assert raised.value.reason == reason
    await assert_healthy(small)


@shared
async def test_verify_stream_refuses_rounds_before_open_and_after_finish(small: System) -> None:
    async with verify_stream(small.verifier_address) as stream:
        stream.token_ids = []
        with pytest.raises(FailedPreconditionError, match="must be an open") as raised:
            await stream.round()
        assert raised.value.reason == "ROUND_BEFORE_OPEN"
    async with verify_stream(small.verifier_address) as stream:
        await stream.open(PROMPT, max_new_tokens=1)
        with pytest.raises(FailedPreconditionError, match="open a new session") as raised:
            await stream.round()
        assert raised.value.reason == "SESSION_FINISHED"
    await assert_healthy(small)


def projecting(**fields: Any) -> target_state_pb2.TargetStateSpec:
    """Return a spec with a projection of one layer's hidden states."""
    right = {"input_size": 32, "output_size": 32, "norm_epsilon": 1e-6, "dtype": "float32"}
    projection = target_state_pb2.Projection(**(right | fields))
    return target_state_pb2.TargetStateSpec(hidden_layer_ids=[0], projection=projection)


BAD_SPECS = [
    (target_state_pb2.TargetStateSpec(), "names nothing"),
    (target_state_pb2.TargetStateSpec(hidden_layer_ids=[99]), "no 'hidden.99'"),
    (target_state_pb2.TargetStateSpec(hidden_layer_ids=[0] * 17), "at most 16"),
    (target_state_pb2.TargetStateSpec(kv_layer_ids=[99]), "Layer 99"),
    (target_state_pb2.TargetStateSpec(kv_layer_ids=[0] * 5), "that of 4"),
    (projecting(input_size=33), "takes 33 values"),
    (projecting(output_size=2**31), "does not fit"),
    (projecting(output_size=0), "does not fit"),
    (projecting(dtype="complex128"), "does not fit"),
]


@shared
@pytest.mark.parametrize(("spec", "fragment"), BAD_SPECS, ids=shown)
async def test_a_spec_the_target_cannot_meet_costs_the_state_only(
    spec: target_state_pb2.TargetStateSpec, fragment: str, small: System
) -> None:
    async with verify_stream(small.verifier_address) as stream:
        first = await stream.open(PROMPT, target_state_spec=spec)
        assert fragment in stream.opened.target_state_refusal
        assert not first.HasField("target_state")
        assert (await stream.round()).committed_length == len(PROMPT) + 2
    await assert_healthy(small)


DRAFT_ROUNDS = [
    ({"new": [5], "committed_length": 99}, FailedPreconditionError, "", "is 99"),
    ({"new": [5], "draft_depth": 0}, InvalidArgumentError, "draft_depth", "1 to 64"),
    ({"new": [5], "draft_depth": 65}, InvalidArgumentError, "draft_depth", "1 to 64"),
    ({"new": [VOCAB_SIZE]}, InvalidArgumentError, "committed_token_ids", str(VOCAB_SIZE)),
    ({"new": [5] * 200}, InvalidArgumentError, "committed_token_ids", "max_length"),
]


@shared
@pytest.mark.parametrize(("fields", "error", "field", "fragment"), DRAFT_ROUNDS, ids=shown)
async def test_draft_stream_refuses_a_round(
    fields: dict[str, Any], error: type[SpecdecError], field: str, fragment: str, small: System
) -> None:
    # Prompt lookup has no vocabulary, so any token id will do for it.
    for drafter in ("model",) if VOCAB_SIZE in fields["new"] else ("model", "ngram"):
        async with draft_stream(small.drafter_address) as stream:
            await stream.open(drafter, PROMPT)
            length = len(PROMPT) + len(fields["new"])
            with pytest.raises(SpecdecError) as raised:
                await stream.round(**({"committed_length": length} | fields))
        assert_refusal(raised, error, field, fragment)
    await assert_healthy(small)


DRAFT_OPENS = [
    ({"drafter": "oracle"}, NotFoundError, "", "ngram, model"),
    ({"committed": []}, InvalidArgumentError, "committed_token_ids", "at least one"),
    ({"committed": [VOCAB_SIZE]}, InvalidArgumentError, "committed_token_ids", str(VOCAB_SIZE)),
    ({"max_length": len(PROMPT) - 1}, InvalidArgumentError, "max_length", str(len(PROMPT))),
    ({"prompt_length": len(PROMPT) + 1}, InvalidArgumentError, "prompt_length", str(len(PROMPT))),
    (sampling(temperature=float("nan")), InvalidArgumentError, "temperature", "in [0, 1000000]"),
]


@shared
@pytest.mark.parametrize(("fields", "error", "field", "fragment"), DRAFT_OPENS, ids=shown)
async def test_draft_stream_refuses_to_open(
    fields: dict[str, Any], error: type[SpecdecError], field: str, fragment: str, small: System
) -> None:
    async with draft_stream(small.drafter_address) as stream:
        with pytest.raises(SpecdecError) as raised:
            await stream.open(**({"drafter": "model", "committed": PROMPT} | fields))
    assert_refusal(raised, error, field, fragment)
    await assert_healthy(small)


@shared
async def test_a_drafter_drafts_though_the_target_knows_more_tokens(small: System) -> None:
    """Its vocabulary may have fewer rows than the target's: what they are told of the others is the target's
    business."""
    async with draft_stream(small.drafter_address) as stream:
        await stream.open("model", PROMPT)
        free = await stream.round([], len(PROMPT))
    beyond = {VOCAB_SIZE: 9.0, 2**31: -9.0}
    for fields in (
        sampling(logit_bias=beyond),
        sampling(top_k=VOCAB_SIZE + 5),
        sampling(allowed_token_ids=[*range(VOCAB_SIZE + 9)]),
    ):
        async with draft_stream(small.drafter_address) as stream:
            await stream.open("model", PROMPT, **fields)
            assert await stream.round([], len(PROMPT)) == free
    async with draft_stream(small.drafter_address) as stream:
        await stream.open("model", PROMPT, **sampling(logit_bias={VOCAB_SIZE: 9.0, 9: 100.0}))
        assert await stream.round([], len(PROMPT)) == [9] * 4


@shared
async def test_draft_stream_refuses_messages_out_of_order(small: System) -> None:
    async with draft_stream(small.drafter_address) as stream:
        with pytest.raises(FailedPreconditionError, match="must be an open"):
            await stream.round([5], 1)
    async with draft_stream(small.drafter_address) as stream:
        await stream.open("ngram", PROMPT)
        with pytest.raises(FailedPreconditionError, match="opened once"):
            await stream.open("ngram", PROMPT)
    await assert_healthy(small)


# Handshakes

HANDSHAKES = [
    (common_pb2.Handshake(), "PROTOCOL_VERSION_MISMATCH", f"version {PROTOCOL_VERSION}"),
    (common_pb2.Handshake(protocol_version=99), "PROTOCOL_VERSION_MISMATCH", "upgrade the older side"),
    (
        common_pb2.Handshake(protocol_version=99, min_protocol_version=PROTOCOL_VERSION + 1),
        "PROTOCOL_VERSION_MISMATCH",
        f"versions {PROTOCOL_VERSION + 1} to 99",
    ),
    (make_handshake(vocabulary_fingerprint=OTHER_VOCABULARY), "VOCABULARY_MISMATCH", "of one vocabulary"),
    (make_handshake(model_id="another/model"), "MODEL_MISMATCH", "another/model"),
]


@shared
@pytest.mark.parametrize(("handshake", "reason", "fragment"), HANDSHAKES)
async def test_peers_refuse_a_handshake(
    handshake: common_pb2.Handshake, reason: str, fragment: str, small: System
) -> None:
    async with verify_stream(small.verifier_address) as stream:
        with pytest.raises(FailedPreconditionError, match=fragment) as raised:
            await stream.open(PROMPT, handshake=handshake)
        assert raised.value.reason == reason
    if reason != "MODEL_MISMATCH":  # a drafter's model is not the target's
        async with draft_stream(small.drafter_address) as draft:
            with pytest.raises(FailedPreconditionError, match=fragment) as raised:
                await draft.open("model", PROMPT, handshake=handshake)
            assert raised.value.reason == reason
    await assert_healthy(small)


# Bytes that are not a message, and messages that are too large

GENERATE = "/specdec.v1.GatewayService/Generate"
VERIFY = "/specdec.v1.VerifierService/Verify"
DRAFT = "/specdec.v1.DrafterService/Draft"


@shared
@pytest.mark.parametrize("data", [b"\x12\x02" + BAD_UTF8, b"\x4a\x02" + BAD_UTF8, b"\x00\xff"])
async def test_malformed_bytes_are_an_invalid_argument_at_the_gateway(data: bytes, small: System) -> None:
    async with aio_channel(small.address) as channel:
        call: Any = channel.unary_stream(GENERATE)(data, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidArgumentError)
    assert "UTF-8" in error.message
    assert error.reason == "MALFORMED_MESSAGE"
    await assert_healthy(small)


@shared
@pytest.mark.parametrize("method", [VERIFY, DRAFT])
@pytest.mark.parametrize("after_open", [False, True])
async def test_malformed_bytes_are_an_invalid_argument_on_a_stream(
    after_open: bool, method: str, small: System
) -> None:
    address, opening = {
        VERIFY: (small.verifier_address, OPEN),
        DRAFT: (
            small.drafter_address,
            drafter_pb2.DraftRequest(
                open=drafter_pb2.DraftOpen(
                    handshake=make_handshake(), drafter="ngram", committed_token_ids=PROMPT, max_length=64
                )
            ),
        ),
    }[method]
    async with aio_channel(address) as channel:
        call: Any = channel.stream_stream(method)(timeout=10)
        if after_open:
            await call.write(opening.SerializeToString())
            assert await call.read() is not grpc.aio.EOF
        await call.write(b"\x1a\x02" + BAD_UTF8)  # traceparent
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidArgumentError)
    assert "UTF-8" in error.message
    await assert_healthy(small)


@shared
async def test_a_50_mb_message_is_refused_with_the_limit(small: System) -> None:
    text = "x" * 50_000_000
    with pytest.raises(ResourceExhaustedError, match=str(GatewayConfig().max_message_bytes)):
        await ask(small.address, generate_request(text=text))
    await assert_healthy(small)
    async with verify_stream(small.verifier_address) as stream:
        await stream.open(PROMPT)
        with pytest.raises(ResourceExhaustedError, match=str(MAX_MESSAGE_BYTES)):
            await stream.ask(verifier_pb2.VerifyRequest(traceparent=text))
    async with draft_stream(small.drafter_address) as draft:
        await draft.open("model", PROMPT)
        with pytest.raises(ResourceExhaustedError, match=str(MAX_MESSAGE_BYTES)):
            await draft.ask(drafter_pb2.DraftRequest(traceparent=text))
    await assert_healthy(small)
