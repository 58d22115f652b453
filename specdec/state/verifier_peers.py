"""The verifiers that state is read from: by address, a channel to each and the weights of its target."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Set
from typing import Any

import grpc

from specdec.contract.errors import (
    FailedPreconditionError,
    PermissionDeniedError,
    SpecdecError,
    UnavailableError,
    from_rpc_error,
    has_details,
)
from specdec.contract.request_id import request_metadata
from specdec.runtime.model_thread import ModelThread
from specdec.state.source import Mappings
from specdec.state.weights import TargetWeights, TargetWeightsRef
from specdec.transport.allow_list import AllowList
from specdec.transport.channel import ServiceChannel
from specdec.transport.tls import OutgoingTls
from specdec.v1 import target_state_pb2 as pb
from specdec.v1 import verifier_pb2_grpc

logger = logging.getLogger(__name__)

_MAX_IDLE_CHANNELS = 8


class VerifierPeers:
    """Channels to verifiers and their targets' weights. Used from one event loop.

    Args:
        mappings: memory of verifiers on this host; None: nothing may be mapped.
        checkpoint: reads the weights where a verifier's own cannot be mapped; None: there are none.
        tls: credentials for verifiers; None: no encryption.
        allowed: the addresses that may be called.
        timeout_s: how long a call may take, seconds.
    """

    def __init__(
        self,
        mappings: Mappings | None,
        checkpoint: Callable[[], TargetWeights] | None,
        tls: OutgoingTls | None,
        *,
        allowed: AllowList,
        timeout_s: float,
    ) -> None:
        self._allowed = allowed
        self._timeout_s = timeout_s
        self._mappings = mappings
        self._checkpoint = checkpoint
        self._tls = tls
        self._channels: dict[str, ServiceChannel] = {}
        self._weights: dict[str, TargetWeights] = {}
        self._reading = asyncio.Lock()
        self._weights_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def uris(self) -> Set[str]:
        """Addresses there is a channel to."""
        return self._channels.keys()

    async def stub(self, uri: str) -> Any:
        """Return a stub of a verifier's methods.

        Raises:
            PermissionDeniedError: the address may not be called.
        """
        if uri not in self._channels and not await self._allowed.allows(uri):
            logger.warning("a verifier's address is not allowed", extra={"verifier": uri})
            raise PermissionDeniedError(
                "This drafter may not call the verifier of the session; start it with a --verifier-allow "
                "that has the verifier's address.",
                reason="VERIFIER_NOT_ALLOWED",
            )
        if uri not in self._channels:
            self._channels[uri] = ServiceChannel(uri, tls=self._tls)
        return verifier_pb2_grpc.VerifierServiceStub(self._channels[uri].current())

    async def weights(self, uri: str) -> TargetWeights:
        """Return a target's embedding and LM head: its verifier's own if they can be mapped, else a
        checkpoint's.

        Raises:
            FailedPreconditionError: they cannot be mapped, and no checkpoint was given.
            SpecdecError: the verifier did not answer, or may not be called.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                # One at a time: two first rounds would map them twice, and drafters pack a head for each.
                async with self._weights_locks[uri]:
                    if uri not in self._weights:
                        self._weights[uri] = await self._map_or_read_weights(uri)
                    return self._weights[uri]
        except TimeoutError:
            raise silent_verifier(self._timeout_s) from None

    def forget_weights(self) -> None:
        """Ask for all weights anew: another process, with another model, may answer at an address by now."""
        self._weights.clear()

    async def close_idle(self, used: Collection[str]) -> None:
        """Close the channels to verifiers that are not in use, once there are many channels."""
        if len(self._channels) <= _MAX_IDLE_CHANNELS:
            return
        idle = [uri for uri in self._channels if uri not in used]
        for uri in idle:
            self._weights.pop(uri, None)
            if not self._weights_locks[uri].locked():
                del self._weights_locks[uri]
        await asyncio.gather(*[self._channels.pop(uri).close() for uri in idle])

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _map_or_read_weights(self, uri: str) -> TargetWeights:
        try:
            return await self._map_weights(uri)
        except FailedPreconditionError as error:
            if self._checkpoint is None:
                raise FailedPreconditionError(
                    f"The target's embedding and LM head cannot be mapped ({error.message}); start the "
                    "drafter with --target MODEL, and it reads them from there.",
                    reason="NO_TARGET_WEIGHTS",
                ) from error
            return await self._read(self._checkpoint)

    async def _read(self, checkpoint: Callable[[], TargetWeights]) -> TargetWeights:
        # On a thread that ends: one that stays would keep the OpenMP workers of its tensor operations.
        async with self._reading:
            thread = ModelThread("target weights")
            try:
                return await asyncio.wrap_future(thread.submit(checkpoint))
            finally:
                thread.close(wait=False)

    async def _map_weights(self, uri: str) -> TargetWeights:
        if self._mappings is None:
            raise FailedPreconditionError("--target-state is stream", reason="STATE_NOT_MAPPED")
        stub = await self.stub(uri)
        try:
            response = await stub.GetTargetWeights(
                pb.GetTargetWeightsRequest(), metadata=request_metadata(), timeout=self._timeout_s
            )
        except grpc.RpcError as error:
            raise from_verifier(error) from error
        ref = TargetWeightsRef.from_proto(response)
        if reason := self._mappings.why_not((ref.embedding, ref.lm_head)):
            raise FailedPreconditionError(reason, reason="STATE_NOT_MAPPED")
        embedding, lm_head = (self._mappings.tensor(tensor) for tensor in (ref.embedding, ref.lm_head))
        return TargetWeights(embedding, lm_head, ref.embedding_scale, ref.final_logit_softcap)


def silent_verifier(timeout_s: float) -> UnavailableError:
    """Return the error of a verifier that takes too long."""
    return UnavailableError(
        f"The verifier did not answer the drafter within {timeout_s:g} s.", reason="VERIFIER_SILENT"
    )


def from_verifier(error: grpc.RpcError) -> SpecdecError:
    """Return the typed error of a failed call. Who named the verifier learns what a verifier says, and
    nothing of an address that has none.
    """
    if has_details(error):
        return from_rpc_error(error)
    logger.warning("a call to a verifier failed", extra={"error": f"{error.code().name}: {error.details()}"})
    return UnavailableError("The drafter cannot reach the verifier; the drafter's log says why.")
