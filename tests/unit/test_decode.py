"""The round loop alone: what it asks of both sides, what it commits, how it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.rounds.controller import FixedSize
from gateway.rounds.decode import decode
from gateway.rounds.tracing import RequestTrace
from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSize, Round, Verified
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import UnavailableError
from specdec.service.exporters import make_telemetry
from specdec.service.telemetry import Telemetry

PROMPT = (90, 91, 92)
WRONG = -1


class FakeVerifier:
    """Picks the tokens of `output`, whatever is drafted; finishes with the last."""

    def __init__(self, output: Sequence[int], *, fails_at: int = -1) -> None:
        self.output = list(output)
        self.fails_at = fails_at
        self.num_committed = 0
        self.drafts: list[tuple[int, ...]] = []
        self.bases: list[int] = []
        self.traceparents: list[str] = []

    async def open(self, traceparent: str) -> Verified:
        return self._answer((), traceparent)

    async def verify(
        self,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        traceparent: str,
        parent_indices: Sequence[int] = (),
    ) -> Verified:
        self.bases.append(base_committed_length)
        self.drafts.append(tuple(draft_token_ids))
        return self._answer(draft_token_ids, traceparent)

    def _answer(self, draft: Sequence[int], traceparent: str) -> Verified:
        if len(self.drafts) == self.fails_at:
            raise UnavailableError("the verifier was lost")
        self.traceparents.append(traceparent)
        wanted = self.output[self.num_committed :]
        matches = [ours == theirs for ours, theirs in zip(draft, wanted[:-1], strict=False)]
        num_accepted = (*matches, False).index(False)
        self.num_committed += num_accepted + 1
        finish_reason = "length" if self.num_committed == len(self.output) else ""
        return Verified(num_accepted, wanted[num_accepted], finish_reason)


class FakeDrafter:
    """Knows the output, and is wrong where told to be."""

    def __init__(self, output: Sequence[int], is_right: Sequence[bool] = ()) -> None:
        self.output = output
        self.is_right = is_right
        self.calls: list[tuple[list[int], int, str]] = []

    async def propose(self, request: DraftRequest) -> Draft:
        draft_depth = request.size.draft_depth
        self.calls.append((list(request.committed_token_ids), draft_depth, request.traceparent))
        start = len(request.committed_token_ids) - len(PROMPT)
        stop = min(start + draft_depth, len(self.output))
        right = [*self.is_right, *[True] * len(self.output)]
        return Draft(tuple(self.output[at] if right[at] else WRONG for at in range(start, stop)))


class NoGuess(FakeDrafter):
    """Never has one."""

    async def propose(self, request: DraftRequest) -> Draft:
        await super().propose(request)
        return Draft(fallback_reason="no idea")


async def run(
    verifier: FakeVerifier,
    drafter: FakeDrafter,
    *,
    draft_depth: int,
    telemetry: Telemetry | None = None,
) -> list[Round]:
    """Return all rounds of a generation."""
    trace = RequestTrace((telemetry or make_telemetry("test")).tracer, "")
    return [
        round_
        async for round_ in decode(
            verifier,
            drafter,
            prompt_token_ids=PROMPT,
            max_new_tokens=len(verifier.output),
            control=FixedSize(DraftSize(draft_depth)),
            trace=trace,
        )
    ]


async def test_a_tree_commits_its_accepted_path() -> None:
    class TreeDrafter(FakeDrafter):
        async def propose(self, request: DraftRequest) -> Draft:
            assert request.size.draft_nodes == 9
            done = len(request.committed_token_ids) - len(PROMPT)
            right = self.output[done : done + request.size.draft_depth]
            nodes, tip = [(-1, WRONG)], -1
            for token in right:
                nodes += [(tip, token), (tip, WRONG - 1)]
                tip = len(nodes) - 2
            return Draft(
                tuple(token for _, token in nodes), parent_indices=tuple(parent for parent, _ in nodes)
            )

    class TreeVerifier(FakeVerifier):
        async def verify(
            self,
            base_committed_length: int,
            draft_token_ids: Sequence[int],
            traceparent: str,
            parent_indices: Sequence[int] = (),
        ) -> Verified:
            tree = DraftTree.of(draft_token_ids, parent_indices)
            wanted, path, node = self.output[self.num_committed :], list[int](), -1
            while (node, wanted[len(path)]) in (
                nodes := list(zip(tree.parents, tree.token_ids, strict=True))
            ):
                if len(path) + 1 == len(wanted):
                    break
                node = nodes.index((node, wanted[len(path)]))
                path.append(node)
            self.num_committed += len(path) + 1
            finish_reason = "length" if self.num_committed == len(self.output) else ""
            bonus = wanted[len(path)]
            return Verified(len(path), bonus, finish_reason, accepted_node_indices=tuple(path))

    output = list(range(30))
    rounds = [
        round_
        async for round_ in decode(
            TreeVerifier(output),
            TreeDrafter(output),
            prompt_token_ids=PROMPT,
            max_new_tokens=30,
            control=FixedSize(DraftSize(4, 9)),
            trace=RequestTrace(make_telemetry("test").tracer, ""),
        )
    ]
    assert [token_id for round_ in rounds for token_id in round_.token_ids] == output
    assert [round_.verified.num_accepted_tokens for round_ in rounds] == [0, 4, 4, 4, 4, 4, 3]


@given(
    is_right=st.lists(st.booleans(), min_size=1, max_size=20),
    draft_depth=st.integers(0, 6),
)
async def test_any_draft_commits_the_targets_tokens(is_right: list[bool], draft_depth: int) -> None:
    output = list(range(len(is_right)))
    verifier, drafter = FakeVerifier(output), FakeDrafter(output, is_right)
    rounds = await run(verifier, drafter, draft_depth=draft_depth)

    assert [token_id for round_ in rounds for token_id in round_.token_ids] == output
    assert [round_.is_prefill for round_ in rounds] == [True] + [False] * (len(rounds) - 1)
    committed = [
        [*PROMPT, *(token_id for round_ in rounds[:index] for token_id in round_.token_ids)]
        for index in range(1, len(rounds))
    ]
    assert verifier.bases == [len(tokens) for tokens in committed]
    for tokens, wanted, _ in drafter.calls:
        assert tokens in committed
        remaining = len(PROMPT) + len(output) - len(tokens)
        assert wanted == min(draft_depth, remaining - 1) > 0


async def test_the_prefill_is_a_round_of_its_own() -> None:
    verifier, drafter = FakeVerifier([7]), FakeDrafter([7])
    (only,) = await run(verifier, drafter, draft_depth=4)
    assert only == Round(Draft(), Verified(0, 7, "length"), is_prefill=True)
    assert not verifier.drafts
    assert not drafter.calls


async def test_drafts_get_shorter_towards_the_end() -> None:
    output = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    drafter = FakeDrafter(output)
    rounds = await run(FakeVerifier(output), drafter, draft_depth=4)
    # 1 of the prefill, 4 + 1, then 3 are left: 2 + 1.
    assert [wanted for _, wanted, _ in drafter.calls] == [4, 2]
    assert [len(round_.token_ids) for round_ in rounds] == [1, 5, 3]


async def test_the_last_token_needs_no_draft() -> None:
    output = [1, 2, 3]
    verifier, drafter = FakeVerifier(output), FakeDrafter(output, [True, False])
    await run(verifier, drafter, draft_depth=4)
    assert [wanted for _, wanted, _ in drafter.calls] == [1]
    assert verifier.drafts == [(WRONG,), ()]


async def test_without_a_guess_a_round_is_plain_decoding() -> None:
    output = [1, 2, 3, 4]
    verifier, drafter = FakeVerifier(output), NoGuess(output)
    rounds = await run(verifier, drafter, draft_depth=2)
    assert verifier.drafts == [(), (), ()]
    assert len(drafter.calls) == 2
    assert [round_.draft.fallback_reason for round_ in rounds] == ["", "no idea", "no idea", ""]


async def test_zero_draft_tokens_never_ask_the_drafter() -> None:
    drafter = FakeDrafter([1, 2, 3])
    rounds = await run(FakeVerifier([1, 2, 3]), drafter, draft_depth=0)
    assert not drafter.calls
    assert len(rounds) == 3


@pytest.mark.parametrize("fails_at", [0, 1, 2])
async def test_a_lost_verifier_ends_the_generation(fails_at: int) -> None:
    output = list(range(20))
    exporter = InMemorySpanExporter()
    telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(exporter))
    verifier, drafter = FakeVerifier(output, fails_at=fails_at), FakeDrafter(output)
    with pytest.raises(UnavailableError, match="the verifier was lost"):
        await run(verifier, drafter, draft_depth=3, telemetry=telemetry)
    assert len(drafter.calls) == fails_at
    *good, failed = exporter.get_finished_spans()
    assert len(good) == fails_at
    assert all(span.status.is_ok for span in good)
    assert not failed.status.is_ok


async def test_both_sides_get_the_span_of_their_round() -> None:
    exporter = InMemorySpanExporter()
    telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(exporter))
    output = list(range(8))
    verifier, drafter = FakeVerifier(output), FakeDrafter(output)
    await run(verifier, drafter, draft_depth=2, telemetry=telemetry)
    assert [span.name for span in exporter.get_finished_spans()] == ["specdec.prefill"] + [
        "specdec.round"
    ] * 3
    sent = [traceparent.split("-")[2] for traceparent in verifier.traceparents]
    assert sent == [f"{span.context.span_id:016x}" for span in exporter.get_finished_spans() if span.context]
    asked = [traceparent for _, _, traceparent in drafter.calls]
    assert asked == verifier.traceparents[1 : 1 + len(asked)]


async def test_untraced_requests_send_no_span() -> None:
    verifier = FakeVerifier([1, 2])
    await run(verifier, FakeDrafter([1, 2]), draft_depth=2)
    assert verifier.traceparents == ["", ""]
