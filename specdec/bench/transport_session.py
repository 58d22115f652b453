"""A Verify session whose rounds all accept the same number of tokens, to measure with."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from specdec.contract.errors import FailedPreconditionError, InternalError, UnavailableError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import TargetStateRef, TargetStateSpec
from specdec.models.files import model_id
from specdec.transport.handshake import make_handshake
from specdec.v1 import verifier_pb2

_FORCED_TOKEN = 3
"""The only token the target may pick: a draft of nothing else is accepted whole, in any data type."""


class VerifySession:
    """One Verify stream in which every draft is accepted whole.

    Args:
        opened: the handle with its tensors.
        result: the answer to the open.
    """

    def __init__(
        self,
        call: Any,
        opened: Any,
        result: verifier_pb2.VerifyResult,
        max_length: int,
        num_draft_tokens: int,
    ) -> None:
        self.max_length = max_length
        self.opened = TargetStateRef.from_proto(opened)
        self._call = call
        self._message = opened
        self._committed_length = result.committed_length
        self._draft = [_FORCED_TOKEN] * num_draft_tokens

    @classmethod
    async def open(
        cls,
        call: Any,
        spec: TargetStateSpec,
        *,
        model: str,
        prefill_tokens: int,
        round_tokens: int,
        num_rounds: int,
    ) -> VerifySession:
        """Prefill a random prompt.

        Args:
            spec: what the session's drafter reads.
            model: the verifier's model: "default", a folder or a hub id.
            prefill_tokens: length of the prompt.
            round_tokens: new tokens of a round, bonus included.
            num_rounds: number of rounds that the session has room for.

        Raises:
            FailedPreconditionError: the verifier exports no such state.
        """
        generator = random.Random(0)
        # The prefill commits a token, and with a further one no round is the last.
        max_new_tokens = num_rounds * round_tokens + 2
        message = verifier_pb2.VerifyOpen(
            handshake=make_handshake(model_id(model)),
            committed_token_ids=[generator.randrange(_FORCED_TOKEN + 1, 256) for _ in range(prefill_tokens)],
            sampling=SamplingParams(allowed_token_ids=(_FORCED_TOKEN,)).to_proto(),
            ignore_eos=True,
            max_new_tokens=max_new_tokens,
            target_state_spec=spec.to_proto(),
        )
        opened = (await _exchange(call, verifier_pb2.VerifyRequest(open=message))).opened
        if not opened.first.HasField("target_state"):
            raise FailedPreconditionError(
                f"The verifier exports no target state: {opened.target_state_refusal or 'no reason given'}",
                reason="NO_TARGET_STATE",
            )
        max_length = prefill_tokens + max_new_tokens
        first = opened.first
        return cls(call, first.target_state, first, max_length, round_tokens - 1)

    def ref(self, cached_length: int = 0) -> TargetStateRef:
        """Parse the handle in the answer to the open anew, with the blocks that the session took since;
        `cached_length`, if given, replaces its own."""
        ref = TargetStateRef.from_proto(self._message)
        return replace(ref, cached_length=cached_length) if cached_length else ref

    async def round(self) -> verifier_pb2.VerifyResult:
        """Verify a draft.

        Raises:
            InternalError: the draft was not accepted whole.
        """
        message = verifier_pb2.VerifyRound(
            base_committed_length=self._committed_length, draft_token_ids=self._draft
        )
        response = await _exchange(self._call, verifier_pb2.VerifyRequest(round=message))
        result: verifier_pb2.VerifyResult = response.result
        if result.num_accepted_tokens != len(self._draft):
            raise InternalError("The verifier refused the only tokens it was allowed to pick.")
        self._committed_length = result.committed_length
        self._message.block_ids.extend(result.target_state.block_ids)
        if result.target_state.HasField("window"):
            self._message.window.CopyFrom(result.target_state.window)
        return result


async def _exchange(call: Any, request: verifier_pb2.VerifyRequest) -> verifier_pb2.VerifyResponse:
    with suppress(asyncio.InvalidStateError):  # the call has ended; reading says why
        await call.write(request)
    response = await call.read()
    if response is grpc.aio.EOF:
        raise UnavailableError("The verifier ended the session.")
    result: verifier_pb2.VerifyResponse = response
    return result
