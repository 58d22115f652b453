"""What a request gets that leaves something open, and the limits of what it says."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.metrics import OTHER
from gateway.request.backends import Backends
from gateway.request.drafts import DraftPlan
from gateway.request.peers import can_run
from gateway.request.plan import make_plan
from gateway.rounds.controller import Controller, FixedSize
from gateway.rounds.vocabulary import DraftSize
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.output_format import OutputFormat
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, target_state_pb2, verifier_pb2

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


TREES = drafter_pb2.DrafterInfo(name="trees", max_draft_depth=16, max_draft_nodes=32, default_draft_depth=6)
SHORT_TREES = drafter_pb2.DrafterInfo(
    name="short", max_draft_depth=5, max_draft_nodes=16, default_draft_depth=4
)
CHAINS = drafter_pb2.DrafterInfo(name="chains", max_draft_depth=12, default_draft_depth=8)
LONG_CHAINS = drafter_pb2.DrafterInfo(name="long", max_draft_depth=30, default_draft_depth=8)
VERIFIER = verifier_pb2.VerifierServiceGetInfoResponse(
    max_draft_nodes=40, model=common_pb2.ModelInfo(max_length=100)
)


def backends(
    *drafters: drafter_pb2.DrafterInfo, default_method: str = "auto", encode_text: Any = None
) -> Backends:
    """Return a gateway's backends, whose only drafter service has these drafters, or was never reached."""
    infos = [drafter_pb2.DrafterServiceGetInfoResponse(drafters=drafters)] if drafters else []
    found: Any = SimpleNamespace(known_infos=infos, is_known=bool(drafters))
    unused: Any = None
    codec: Any = SimpleNamespace(vocabulary_fingerprint="ours", encode_text=encode_text)
    config = GatewayConfig(default_method=default_method)
    return Backends(config, codec, unused, found, unused)


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
    assert backends(*drafters).best_guess == expected


def test_a_method_that_is_set_is_the_default_where_it_is_offered() -> None:
    assert backends(NGRAM, MTP, default_method="ngram").default_method == "ngram"
    assert backends(NGRAM, default_method="mtp").default_method == "none"
    assert backends(default_method="mtp").default_method == "mtp", "it may come up while the request runs"


def test_a_label_is_the_same_in_any_order_and_no_invention_of_a_client() -> None:
    known = backends(NGRAM, SMALL)
    assert known.label("ngram+small") == known.label("small+ngram") == "ngram+small"
    assert known.label("none") == "none"
    assert known.label("invented") == known.label("ngram+invented") == OTHER


async def drafting(method: str, **fields: Any) -> DraftPlan:
    """Return what a request with these fields has drafted, where the drafters are TREES, SHORT_TREES,
    CHAINS and LONG_CHAINS.
    """
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(token_ids=[1, 2, 3]), method=method, **fields
    )
    known = backends(TREES, SHORT_TREES, CHAINS, LONG_CHAINS)
    return (await make_plan(request, known, VERIFIER, max_new_tokens=5)).drafting


def lengths(plan: DraftPlan) -> list[int]:
    return [proposer.draft_depth for proposer in plan.proposers]


async def test_chosen_sizes_keep_to_the_limits_of_drafter_verifier_and_request() -> None:
    free = await drafting("trees")
    assert (lengths(free), free.size, free.draft_nodes) == ([16], DraftSize(6), 40)
    assert free.candidates[0].budgets == (0, 7, 15, 31)
    few = await drafting("trees", draft_nodes=3)
    assert (lengths(few), few.size, few.draft_nodes) == ([3], DraftSize(3, 3), 3)
    assert few.candidates[0].budgets == (0, 3)
    assert (await drafting("trees", draft_nodes=15)).candidates[0].budgets == (0, 7, 15)
    chains = await drafting("chains")
    assert (lengths(chains), chains.size, chains.draft_nodes) == ([12], DraftSize(8), 0)
    assert chains.candidates[0].budgets == (0,)
    merged = await drafting("trees+short", draft_nodes=10)
    assert (lengths(merged), merged.size, merged.draft_nodes) == ([10, 5], DraftSize(6, 10), 10)
    mixed = await drafting("chains+short")
    assert (mixed.draft_nodes, mixed.candidates[0].budgets) == (40, (0,))
    assert await drafting("none") == DraftPlan()


async def test_sizes_of_the_request_keep_to_the_limits() -> None:
    chain = await drafting("trees", draft_depth=9)
    assert (lengths(chain), chain.size, chain.draft_nodes) == ([9], DraftSize(9), 0)
    tree = await drafting("trees", draft_depth=9, draft_nodes=6)
    assert (lengths(tree), tree.size, tree.draft_nodes) == ([6], DraftSize(6, 6), 6)
    merged = await drafting("trees+short", draft_depth=9)
    assert (lengths(merged), merged.size, merged.draft_nodes) == ([9, 5], DraftSize(9), 14)
    assert (await drafting("trees+chains+short", draft_depth=16)).draft_nodes == 33
    too_many = await drafting("trees+long", draft_depth=25)
    assert (lengths(too_many), too_many.draft_nodes) == ([16, 25], 40), "the verifier takes no more"
    assert lengths(await drafting("trees", draft_depth=0)) == []
    for plan in (chain, tree, merged):
        assert plan.candidates == ()
    with pytest.raises(InvalidArgumentError, match="at most 16"):
        await drafting("trees+short", draft_depth=17)
    with pytest.raises(InvalidArgumentError, match="at most 40"):
        await drafting("trees", draft_nodes=41)


async def test_memory_behind_the_end_is_reserved_for_trees_of_a_size_that_stays() -> None:
    assert (await drafting("trees", draft_depth=4)).num_reserved_nodes == 0
    assert (await drafting("trees", draft_depth=4, draft_nodes=6)).num_reserved_nodes == 6
    assert (await drafting("trees")).num_reserved_nodes == 0
    assert (await drafting("trees", draft_nodes=6)).num_reserved_nodes == 0


@pytest.mark.parametrize(("wanted", "expected"), [(5, 5), (97, 97), (98, 97), (5000, 97)])
async def test_an_answer_is_no_longer_than_the_context(wanted: int, expected: int) -> None:
    request = gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(token_ids=[1, 2, 3]))
    plan = await make_plan(request, backends(), VERIFIER, max_new_tokens=wanted)
    assert plan.max_new_tokens == expected


async def test_a_format_is_for_verifiers_that_take_formats_only() -> None:
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(token_ids=[1]), output_format=common_pb2.OutputFormat(regex="a+")
    )
    taking = verifier_pb2.VerifierServiceGetInfoResponse(
        max_draft_nodes=40, model=VERIFIER.model, takes_output_formats=True
    )
    plan = await make_plan(request, backends(), taking, max_new_tokens=4)
    assert plan.output_format == OutputFormat(regex="a+")
    assert can_run(plan, VERIFIER.model, taking)
    assert not can_run(plan, VERIFIER.model, VERIFIER)
    with pytest.raises(FailedPreconditionError, match="takes no output format") as raised:
        await make_plan(request, backends(), VERIFIER, max_new_tokens=4)
    assert raised.value.reason == "NO_OUTPUT_FORMATS"
    request.ClearField("output_format")
    plan = await make_plan(request, backends(), VERIFIER, max_new_tokens=4)
    assert can_run(plan, VERIFIER.model, VERIFIER)


async def test_a_special_token_among_the_stop_strings_stops_as_a_token() -> None:
    known = backends()
    known.codec.special_token = {"<end>": 7}.get  # type: ignore[method-assign, assignment]
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(token_ids=[1]), stop_strings=["a", "<end>"], stop_token_ids=[5]
    )
    plan = await make_plan(request, known, VERIFIER, max_new_tokens=4)
    assert plan.stop_token_ids == (5, 7)
    assert plan.stop_strings == ("a", "<end>")


async def test_of_a_method_that_nobody_offers_nothing_is_kept() -> None:
    controller = Controller()
    for number in range(100):
        request = gateway_pb2.GenerateRequest(
            token_ids=gateway_pb2.TokenIds(token_ids=[1]), method=f"made-up-{number}"
        )
        plan = await make_plan(request, backends(), VERIFIER, max_new_tokens=40)
        assert isinstance(plan.drafting.control(controller, object(), is_greedy=True), FixedSize)
    assert not controller._methods


class Texts:
    """Tokenises texts by their first letter, each when it is told to; counts how many it is at."""

    def __init__(self) -> None:
        self.may_end = {letter: threading.Event() for letter in "abc"}
        self.begun: list[str] = []
        self.most_at_once = 0
        self._running = 0
        self._lock = threading.Lock()

    def encode_text(self, text: str) -> list[int]:
        with self._lock:
            self.begun.append(text[0])
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            assert self.may_end[text[0]].wait(20)
            if text[0] == "a":
                raise ValueError("a defect")
        finally:
            with self._lock:
                self._running -= 1
        return [1]

    async def has_begun(self, letter: str) -> None:
        async with asyncio.timeout(20):
            while letter not in self.begun:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def plan(self, *texts: str) -> list[asyncio.Task[Any]]:
        known = backends(encode_text=self.encode_text)
        requests = [gateway_pb2.GenerateRequest(text=text) for text in texts]
        return [
            asyncio.ensure_future(make_plan(request, known, VERIFIER, max_new_tokens=5))
            for request in requests
        ]


async def test_long_texts_are_tokenised_one_after_the_other() -> None:
    """The next text's turn comes whether the text before it failed or nobody waits for it any more."""
    texts = Texts()
    first, second, third = texts.plan("a" * 70_000, "b" * 70_000, "c" * 70_000)
    await texts.has_begun("a")
    texts.may_end["a"].set()
    with pytest.raises(ValueError, match="a defect"):
        await first
    await texts.has_begun("b")
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    texts.may_end["c"].set()
    ended, _ = await asyncio.wait({third}, timeout=0.05)
    assert not ended, "the second's thread goes on"
    texts.may_end["b"].set()
    assert (await third).prompt_token_ids == [1]
    assert texts.most_at_once == 1


async def test_short_texts_are_tokenised_side_by_side() -> None:
    texts = Texts()
    plans = texts.plan("b" * 60_000, "c" * 60_000)
    for letter in "bc":
        await texts.has_begun(letter)
    assert texts.most_at_once == 2
    for letter in "bc":
        texts.may_end[letter].set()
    await asyncio.gather(*plans)
