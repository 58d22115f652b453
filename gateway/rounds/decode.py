"""The draft-verify loop, in pure asyncio: services appear as two small interfaces, tokens as ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from gateway.rounds.tracing import RequestTrace
from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSource, Round, SizeControl, VerifierSession


async def decode(
    verifier: VerifierSession,
    drafter: DraftSource,
    *,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    control: SizeControl,
    trace: RequestTrace,
) -> AsyncGenerator[Round]:
    """Generate round by round until the target says it has finished.

    Args:
        control: how much each round drafts.

    Raises:
        SpecdecError: the verifier failed. A drafter cannot fail a generation.
    """
    committed = list(prompt_token_ids)
    max_length = len(committed) + max_new_tokens
    with trace.prefill() as span:
        current = Round(Draft(), await verifier.open(span.traceparent), is_prefill=True)
        span.describe(current)
    committed.extend(current.token_ids)
    yield current
    while not current.verified.finish_reason:
        with trace.round() as span:
            # A round commits one token more than it accepts, so the last remaining token needs no draft.
            size = control.choose(max_length - len(committed) - 1)
            draft = Draft()
            if size.draft_depth > 0 or size.joining:
                request = DraftRequest(committed, size, span.traceparent, current.verified.target_state)
                draft = await drafter.propose(request)
            verified = await verifier.verify(
                len(committed), draft.token_ids, span.traceparent, draft.parent_indices
            )
            current = Round(draft, verified)
            span.describe(current, size)
        if not verified.is_reopened:
            # The next request does not wait for what this round teaches.
            asyncio.get_running_loop().call_soon(control.observe, size, current)
        committed.extend(current.token_ids)
        yield current
