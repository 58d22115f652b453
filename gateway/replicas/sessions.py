"""Sessions on remote services: one request and one answer a round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from gateway.replicas.remote_state import RemoteState
from gateway.replicas.shared_calls import CallKind, SharedCalls
from gateway.rounds.vocabulary import Draft, DraftRequest, StateHandle, TokenLogprobs, Verified
from specdec.contract.errors import (
    FailedPreconditionError,
    UnavailableError,
)
from specdec.contract.finish_reasons import FINISH_REASONS
from specdec.contract.load import Load
from specdec.transport.handshake import check_handshake
from specdec.v1 import (
    common_pb2,
    drafter_pb2,
    drafter_pb2_grpc,
    target_state_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)

logger = logging.getLogger(__name__)

VERIFYING = CallKind(
    lambda channel: verifier_pb2_grpc.VerifierServiceStub(channel).VerifyMany(),
    verifier_pb2.VerifyManyRequest,
    "Verifier",
)
DRAFTING = CallKind(
    lambda channel: drafter_pb2_grpc.DrafterServiceStub(channel).DraftMany(),
    drafter_pb2.DraftManyRequest,
    "Drafter",
)

OnLoad = Callable[[Load], None]
"""Told how busy a replica says it is."""


class RemoteVerifierSession:
    """A session on one verifier replica. Use as `async with`.

    Args:
        drafters: whose specs the request's `drafter_state_specs` are.
        on_load: told with every answer.
        round_timeout_s: how long a round may take until the verifier counts as lost; None: any time.
    """

    def __init__(
        self,
        calls: SharedCalls,
        uri: str,
        request: verifier_pb2.VerifyOpen,
        timeout_s: float | None,
        drafters: Sequence[str] = (),
        *,
        on_load: OnLoad,
        round_timeout_s: float | None = None,
    ) -> None:
        self._stream = calls.begin(timeout_s)
        self._request = request
        self._drafters = drafters
        self._on_load = on_load
        self._uri, self._round_timeout_s = uri, round_timeout_s
        self._state: RemoteState | None = None

    async def __aenter__(self) -> RemoteVerifierSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.close()

    async def open(self, traceparent: str) -> Verified:
        """Prefill the prompt; the first token is the bonus token."""
        request = verifier_pb2.VerifyRequest(open=self._request, traceparent=traceparent)
        response, elapsed_ns = await self._stream.exchange(request)
        check_handshake(
            response.opened.handshake,
            model_id=self._request.handshake.model_id,
            vocabulary_fingerprint=self._request.handshake.vocabulary_fingerprint,
        )
        first, refusals = response.opened.first, self._refusals(response.opened)
        if first.HasField("target_state") or refusals:
            opened = first.target_state if first.HasField("target_state") else None
            self._state = RemoteState(opened, first.cached_length, refusals=refusals)
        _tell(self._on_load, first)
        verified = _verified(first, elapsed_ns, self._state)
        return replace(verified, num_reused_tokens=response.opened.num_reused_tokens)

    def _refusals(self, opened: verifier_pb2.VerifyOpened) -> dict[str, str]:
        """Return why drafters get no state of the session, by name; an older verifier serves all or none."""
        reasons = opened.drafter_state_refusals or [opened.target_state_refusal] * len(self._drafters)
        refusals = {name: reason for name, reason in zip(self._drafters, reasons, strict=False) if reason}
        for name, reason in refusals.items():
            logger.warning("a drafter gets no target state", extra={"drafter": name, "reason": reason})
        return refusals

    async def verify(
        self,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        traceparent: str,
        parent_indices: Sequence[int] = (),
    ) -> Verified:
        """Check a draft, chain or tree, in one pass."""
        message = verifier_pb2.VerifyRound(
            base_committed_length=base_committed_length,
            draft_token_ids=draft_token_ids,
            parent_indices=parent_indices,
        )
        request = verifier_pb2.VerifyRequest(round=message, traceparent=traceparent)
        try:
            async with asyncio.timeout(self._round_timeout_s):
                response, elapsed_ns = await self._stream.exchange(request)
        except TimeoutError:
            raise UnavailableError(
                f"Verifier {self._uri} was lost (no answer within {self._round_timeout_s:g} s); send the "
                "request again.",
                reason="PEER_LOST",
                retry_after_s=1.0,
            ) from None
        if self._state:
            self._state = self._state.after(response.result)
        _tell(self._on_load, response.result)
        return _verified(response.result, elapsed_ns, self._state)


def _tell(
    on_load: OnLoad, answer: verifier_pb2.VerifyResult | drafter_pb2.DraftOpened | drafter_pb2.DraftResult
) -> None:
    """Pass on how busy a replica is, where it says so."""
    if answer.HasField("load"):
        on_load(Load.from_proto(answer.load))


def _verified(
    result: verifier_pb2.VerifyResult, elapsed_ns: int, target_state: RemoteState | None
) -> Verified:
    timings = result.timings
    return Verified(
        num_accepted_tokens=result.num_accepted_tokens,
        bonus_token_id=result.bonus_token_id,
        # A newer verifier may have more reasons to end.
        finish_reason=FINISH_REASONS.get(result.finish_reason, "stop_token"),
        logprobs=tuple(_logprobs(entry) for entry in result.logprobs),
        server_ns=min(timings.total_ns, elapsed_ns),
        elapsed_ns=elapsed_ns,
        compute_ns=timings.compute_ns,
        batch_size=timings.batch_size,
        batch_tokens=timings.batch_tokens,
        batch_background_tokens=timings.batch_background_tokens,
        target_state=target_state,
        accepted_node_indices=tuple(result.accepted_node_indices),
    )


def _logprobs(entry: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return entry.logprob, tuple((candidate.token_id, candidate.logprob) for candidate in entry.top)


class RemoteDrafterSession:
    """A session on one drafter replica.

    Args:
        drafter: what the replica says of the drafter.
        on_load: told with every answer.
    """

    def __init__(
        self,
        calls: SharedCalls,
        timeout_s: float | None,
        drafter: drafter_pb2.DrafterInfo,
        on_load: OnLoad,
    ) -> None:
        self._on_load = on_load
        self._stream = calls.begin(timeout_s)
        self._drafter = drafter
        self.reads_target_state = drafter.HasField("target_state_spec")
        self._num_known_blocks = 0
        """How many blocks of the target's session the drafter was told of."""

    async def open(self, message: drafter_pb2.DraftOpen) -> None:
        """Start the session; the drafter reads the committed tokens."""
        response, _ = await self._stream.exchange(drafter_pb2.DraftRequest(open=message))
        check_handshake(
            response.opened.handshake,
            model_id="",
            vocabulary_fingerprint=message.handshake.vocabulary_fingerprint,
        )
        _tell(self._on_load, response.opened)

    async def propose(self, new_token_ids: Sequence[int], request: DraftRequest) -> Draft:
        """Guess what follows, after `new_token_ids` were committed since the last call."""
        draft_depth, draft_nodes = request.size.draft_depth, request.size.draft_nodes
        message = drafter_pb2.DraftRound(
            committed_token_ids=new_token_ids,
            committed_length=len(request.committed_token_ids),
            # The plan may be older than what the replica told of its limits.
            draft_depth=min(draft_depth, self._drafter.max_draft_depth or draft_depth),
            target_state=self._state_message(request.target_state) if self.reads_target_state else None,
            draft_nodes=min(draft_nodes, self._drafter.max_draft_nodes),
            min_path_confidence=request.size.min_path_confidence,
        )
        round_message = drafter_pb2.DraftRequest(round=message, traceparent=request.traceparent)
        response, elapsed_ns = await self._stream.exchange(round_message)
        result = response.result
        _tell(self._on_load, result)
        # One token too many is refused like a million, which would only take memory and time.
        limit = max(draft_depth, draft_nodes) + 1
        return Draft(
            tuple(result.draft_token_ids[:limit]),
            min(result.timings.total_ns, elapsed_ns),
            elapsed_ns,
            result.timings.compute_ns // max(1, result.timings.batch_size),
            parent_indices=tuple(result.parent_indices[:limit]),
        )

    def _state_message(self, state: StateHandle | None) -> target_state_pb2.TargetStateRef | None:
        """Return the handle, with its tensors the first time, and with the blocks that are new.

        Raises:
            FailedPreconditionError: the verifier refused to export what the drafter needs.
        """
        if state is None:
            return None
        assert isinstance(state, RemoteState)
        if refusal := state.refusals.get(self._drafter.name):
            raise FailedPreconditionError(
                f"the verifier exports no target state for it: {refusal}", reason="NO_TARGET_STATE"
            )
        message = state.message(num_known_blocks=self._num_known_blocks)
        self._num_known_blocks = state.num_blocks
        return message

    async def close(self) -> None:
        """End the session."""
        await self._stream.close()
