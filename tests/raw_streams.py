"""Verify and Draft streams by hand, one message at a time, and bounded waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from specdec.contract.errors import from_rpc_error
from specdec.transport.channel import TlsConfig, aio_channel
from specdec.transport.handshake import make_handshake
from specdec.v1 import drafter_pb2, drafter_pb2_grpc, verifier_pb2, verifier_pb2_grpc


class RawStream:
    """A bidirectional call that raises the typed error it ends with."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def ask(self, message: Any) -> Any:
        """Send a message and await its answer."""
        try:
            await self.call.write(message)
            answer = await self.call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            answer = grpc.aio.EOF
        if answer is grpc.aio.EOF:
            call = self.call
            raise from_rpc_error(
                grpc.aio.AioRpcError(
                    await call.code(),
                    await call.initial_metadata(),
                    await call.trailing_metadata(),
                    await call.details(),
                )
            )
        return answer


class VerifyStream(RawStream):
    """A session on a verifier. Checks the lengths of every answer against the tokens it was told."""

    token_ids: list[int]
    """Committed tokens, prompt included."""
    opened: verifier_pb2.VerifyOpened
    """The answer to the open."""

    async def open(
        self, prompt: Sequence[int], *, max_new_tokens: int = 8, **fields: Any
    ) -> verifier_pb2.VerifyResult:
        """Open the session and return its first token."""
        fields = {"handshake": make_handshake(), "max_new_tokens": max_new_tokens, **fields}
        message = verifier_pb2.VerifyOpen(committed_token_ids=prompt, **fields)
        answer = await self.ask(verifier_pb2.VerifyRequest(open=message))
        self.token_ids, self.opened = list(prompt), answer.opened
        return self._take((), answer.opened.first)

    async def round(
        self, draft: Sequence[int] = (), base: int | None = None, *, parents: Sequence[int] = ()
    ) -> verifier_pb2.VerifyResult:
        """Run one round; `base` other than the session's committed length is a mistake to be refused."""
        message = verifier_pb2.VerifyRound(
            base_committed_length=len(self.token_ids) if base is None else base,
            draft_token_ids=draft,
            parent_indices=parents,
        )
        answer = await self.ask(verifier_pb2.VerifyRequest(round=message))
        return self._take(draft, answer.result)

    def _take(self, draft: Sequence[int], result: verifier_pb2.VerifyResult) -> verifier_pb2.VerifyResult:
        assert result.num_accepted_tokens <= len(draft)
        path = result.accepted_node_indices or range(result.num_accepted_tokens)
        assert len(path) == result.num_accepted_tokens
        self.token_ids += [*(draft[node] for node in path), result.bonus_token_id]
        assert result.committed_length == len(self.token_ids)
        assert result.cached_length == result.committed_length - 1
        return result


class DraftStream(RawStream):
    """A session on a drafter."""

    async def open(self, drafter: str, committed: Sequence[int], **fields: Any) -> drafter_pb2.DraftOpened:
        """Open the session."""
        fields = {"handshake": make_handshake(), "max_length": len(committed) + 64, **fields}
        message = drafter_pb2.DraftOpen(drafter=drafter, committed_token_ids=committed, **fields)
        return (await self.ask(drafter_pb2.DraftRequest(open=message))).opened

    async def round(
        self, new: Sequence[int], committed_length: int, draft_depth: int = 4, **fields: Any
    ) -> list[int]:
        """Return the draft of one round."""
        message = drafter_pb2.DraftRound(
            committed_token_ids=new,
            committed_length=committed_length,
            draft_depth=draft_depth,
            **fields,
        )
        return list((await self.ask(drafter_pb2.DraftRequest(round=message))).result.draft_token_ids)


@asynccontextmanager
async def verify_stream(address: str, *, tls: TlsConfig | None = None) -> AsyncIterator[VerifyStream]:
    """Open a Verify stream; cancel it at the end."""
    async with aio_channel(address, tls=tls) as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(timeout=60)
        yield VerifyStream(call)
        call.cancel()


@asynccontextmanager
async def draft_stream(address: str, *, tls: TlsConfig | None = None) -> AsyncIterator[DraftStream]:
    """Open a Draft stream; cancel it at the end."""
    async with aio_channel(address, tls=tls) as channel:
        call = drafter_pb2_grpc.DrafterServiceStub(channel).Draft(timeout=60)
        yield DraftStream(call)
        call.cancel()


async def run_session(
    address: str,
    prompt: Sequence[int],
    *,
    drafts: Iterable[Sequence[int]] = (),
    **fields: Any,
) -> list[verifier_pb2.VerifyResult]:
    """Run a whole session, a round per draft, then plain rounds until the target finishes; return all its
    answers.
    """
    async with verify_stream(address) as stream:
        results = [await stream.open(prompt, **fields)]
        waiting = iter(drafts)
        while not results[-1].finish_reason:
            results.append(await stream.round(next(waiting, ())))
        assert len(stream.token_ids) - len(prompt) <= fields.get("max_new_tokens", 8)
        return results


def tokens_of(results: Sequence[verifier_pb2.VerifyResult], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Return the output tokens of a session whose first rounds had these drafts."""
    output = [results[0].bonus_token_id]
    for result, draft in zip(results[1:], [*drafts, *[()] * len(results)], strict=False):
        output += [*draft[: result.num_accepted_tokens], result.bonus_token_id]
    return output


async def output_of(address: str, prompt: Sequence[int], **fields: Any) -> list[int]:
    """Return the output tokens of a session without drafts."""
    return [result.bonus_token_id for result in await run_session(address, prompt, **fields)]


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition that nothing announces; the limit ends what hangs, on a busy machine as well."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)
