"""One engine step of drafters that read the target's state: what is wrong with one session is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Confidence, Drafter, DraftItem, DraftSession, OpenDraft
from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from drafter_service.drafters.dflash.drafter import DFlashDrafter
from drafter_service.drafters.head import DraftHead
from drafter_service.drafters.mtp.checkpoint import Assistant
from drafter_service.drafters.mtp.drafter import MtpDrafter
from drafter_service.families import load_drafters
from drafter_service.host import DrafterHost
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    SpecdecError,
    UnavailableError,
)
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import (
    LAST_HIDDEN,
    TargetStateSpec,
    TensorRef,
    hidden_name,
    key_name,
    value_name,
)
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.state.view import TargetStateView
from specdec.state.weights import TargetWeights
from tests.tiny_assistants import save_tiny_assistant
from tests.tiny_dflash import TARGET_LAYER_IDS, save_as_z_lab, save_tiny_dflash
from tests.tiny_models import VOCAB_SIZE

HIDDEN_SIZE = 32
PROMPT = (5, 80, 7, 200, 33, 9)
K = 3
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def mtp(folder: Path) -> Drafter:
    """Return an assistant with the target's head."""
    path = save_tiny_assistant(folder / "mtp", "llama", specdec_target_head=True)
    assistant = Assistant.load(str(path), dtype="float32", device="cpu")
    return MtpDrafter("mtp", assistant, max_draft_depth=8)


def dflash(folder: Path) -> Drafter:
    """Return a drafter whose checkpoint says how large the vocabulary is."""
    source = save_tiny_dflash(folder / "source", layer_types=["full_attention"] * 2)
    return loaded_dflash(save_as_z_lab(source, folder / "dflash"))


def muse(folder: Path) -> Drafter:
    """Return a drafter whose checkpoint does not say how large the vocabulary is."""
    return loaded_dflash(save_tiny_dflash(folder / "muse"))


def loaded_dflash(path: Path) -> Drafter:
    checkpoint = DFlashCheckpoint.load(str(path), dtype="float32", device="cpu")
    return DFlashDrafter("dflash", checkpoint, kv_budget_bytes=2**20, max_draft_depth=8)


@pytest.fixture(params=[mtp, dflash, muse])
def drafter(request: pytest.FixtureRequest, tmp_path: Path) -> Drafter:
    make: Callable[[Path], Drafter] = request.param
    return make(tmp_path)


def target_weights(drafter: Drafter, num_padding: int = 0, *, head_width: int | None = None) -> TargetWeights:
    """Return the weights of one target, always the same except for rows of padding, which any state would
    choose.
    """
    generator = torch.Generator().manual_seed(0)
    width = head_width or (24 if drafter.traits.family == "mtp" else HIDDEN_SIZE)
    embedding = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    head = torch.randn(VOCAB_SIZE, width, generator=generator)
    padding = torch.cat([torch.eye(width), -torch.eye(width)])[:num_padding] * 100
    return TargetWeights(
        torch.cat([embedding, torch.zeros(num_padding, HIDDEN_SIZE)]), torch.cat([head, padding])
    )


def state(drafter: Drafter, length: int) -> TargetStateView:
    """Return the state of a target of the right shape."""
    generator = torch.Generator().manual_seed(1)

    def rows(*shape: int) -> Tensor:
        return torch.randn(BLOCK_TOKENS, *shape, generator=generator)

    tensors = {name: rows(HIDDEN_SIZE) for name in (LAST_HIDDEN, *map(hidden_name, TARGET_LAYER_IDS))}
    refs = []
    for layer, kind in enumerate(("sliding_attention", "full_attention")):
        for name in (key_name(layer), value_name(layer)):
            tensors[name] = rows(2, 8)
            refs.append(TensorRef(name, "float32", (BLOCK_TOKENS, 2, 8), attention_type=kind))
    spec = drafter.traits.target_state_spec or TargetStateSpec()
    allocation = KvAllocation.of([0], torch.device("cpu"))
    return TargetStateView(spec, tensors, refs, allocation, length, drafter.projection)


def session(
    drafter: Drafter,
    weights: TargetWeights,
    token_ids: tuple[int, ...] = PROMPT,
    sampling: SamplingParams = SAMPLED,
    max_length: int = 40,
) -> DraftSession:
    opened = drafter.open(OpenDraft(token_ids, len(token_ids), max_length, sampling))
    opened.view, opened.target_weights = state(drafter, len(token_ids) - 1), weights
    return opened


def propose(drafter: Drafter, *sessions: DraftSession) -> list[list[int] | SpecdecError]:
    return list(drafter.propose([DraftItem(drafter, opened, K, 1) for opened in sessions]))


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
@pytest.mark.parametrize("drafter", [mtp, dflash], indirect=True)
def test_rows_of_the_head_that_no_token_has_change_nothing(
    sampling: SamplingParams, drafter: Drafter
) -> None:
    (plain,) = propose(drafter, session(drafter, target_weights(drafter), sampling=sampling))
    padded = [session(drafter, target_weights(drafter, 12), sampling=sampling)]
    padded += [session(drafter, padded[0].target_weights, PROMPT[1:])]  # type: ignore[arg-type]
    assert isinstance(plain, list)
    assert len(plain) == K
    assert propose(drafter, *padded)[0] == plain


def test_drafts_end_where_the_generation_does(drafter: Drafter) -> None:
    weights = target_weights(drafter)
    rooms = range(K + 2)
    sessions = [session(drafter, weights, max_length=len(PROMPT) + room) for room in rooms]
    assert [len(draft) for draft in propose(drafter, *sessions)] == [0, 1, 2, 3, 3]  # type: ignore[arg-type]
    sessions = [session(drafter, weights, max_length=len(PROMPT) + room) for room in rooms]
    nothing, *trees = drafter.propose([DraftItem(drafter, opened, K, 1, 64) for opened in sessions])
    assert nothing == []
    assert [tree.depth for tree in trees if isinstance(tree, DraftTree)] == [1, 2, 3, 3]


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_a_drafter_without_a_vocabulary_has_the_targets(sampling: SamplingParams, tmp_path: Path) -> None:
    drafter = muse(tmp_path)
    weights = target_weights(drafter)
    # More rows than there are embeddings: no token that cannot be embedded is drafted.
    wide = TargetWeights(weights.embedding, target_weights(drafter, 12).lm_head)
    (expected,), (draft,) = (
        propose(drafter, session(drafter, given, sampling=sampling)) for given in (weights, wide)
    )
    assert isinstance(expected, list)
    assert draft == expected


@pytest.mark.parametrize(
    ("token_ids", "sampling", "message"),
    [
        ((*PROMPT, VOCAB_SIZE), SAMPLED, "committed_token_ids"),
        ((VOCAB_SIZE, *PROMPT), SamplingParams(repetition_penalty=1.1), "committed_token_ids"),
    ],
)
def test_tokens_the_target_lacks_are_their_sessions_error(
    token_ids: tuple[int, ...], sampling: SamplingParams, message: str, tmp_path: Path
) -> None:
    drafter = muse(tmp_path)
    weights = target_weights(drafter)
    (expected,) = propose(drafter, session(drafter, weights))
    strange = session(drafter, weights, token_ids, sampling)
    error, draft = propose(drafter, strange, session(drafter, weights))
    assert isinstance(error, InvalidArgumentError)
    assert error.field == message
    assert draft == expected


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), SamplingParams(allowed_token_ids=(VOCAB_SIZE,))],
)
def test_parameters_about_tokens_that_a_drafter_lacks_change_no_draft(
    sampling: SamplingParams, tmp_path: Path
) -> None:
    drafter = muse(tmp_path)
    weights = target_weights(drafter)
    (expected,) = propose(drafter, session(drafter, weights, PROMPT, SamplingParams()))
    assert propose(drafter, session(drafter, weights, PROMPT, sampling)) == [expected]


@pytest.mark.parametrize("drafter", [mtp, dflash], indirect=True)
async def test_tokens_a_drafter_lacks_are_refused_at_the_opening(drafter: Drafter) -> None:
    host = DrafterHost({"it": drafter}, DrafterConfig())
    with pytest.raises(InvalidArgumentError, match=r"committed_token_ids\[1\]"):
        await host.open(drafter, OpenDraft((1, VOCAB_SIZE), 2, 8)).__aenter__()
    assert host.num_sessions == 0
    host.close()


@pytest.mark.parametrize("draft_vocab", [None, torch.tensor([3, 70, 200])])
def test_a_token_is_as_sure_as_the_head_says_whatever_the_head_covers(draft_vocab: Tensor | None) -> None:
    head = DraftHead(draft_vocab, lambda states: states, torch.float32, vocab_size=VOCAB_SIZE)
    token_ids = [0, 1, 2] if draft_vocab is None else draft_vocab.tolist()
    logits = torch.tensor([0.1, 0.3, 0.6]).log()
    assert [head.confidence(logits, token_id) for token_id in token_ids] == pytest.approx([0.1, 0.3, 0.6])
    draft: list[int] = []
    confidence = Confidence(0.3 - 1e-6, 0.0)
    sure = [head.extend(draft, token_id, logits, confidence) for token_id in (*token_ids, token_ids[0])]
    assert sure == [False, True, True, False]
    assert draft == token_ids, "the first in any case, the last was not likely enough"


def test_a_chain_ends_where_its_tokens_together_are_too_unlikely() -> None:
    head = DraftHead(None, lambda states: states, torch.float32, vocab_size=3)
    logits = torch.tensor([0.05, 0.15, 0.8]).log()
    confidence, draft = Confidence(0.0, 0.6), list[int]()
    assert [head.extend(draft, 2, logits, confidence) for _ in range(3)] == [True, True, False]
    assert draft == [2, 2]
    anything = Confidence(0.0, 0.0)
    assert all(head.extend(draft, 0, logits, anything) for _ in range(5))


def test_memory_is_as_many_mib_as_the_configuration_says(tiny_llama: Path, tmp_path: Path) -> None:
    own = dflash(tmp_path)
    drafters = (f"dflash:{tmp_path / 'dflash'}", f"causal-lm:{tiny_llama}")
    loaded = load_drafters(DrafterConfig(drafter=drafters, dtype="float32", kv_cache_mib=1.0))
    pools = [drafter.kv_pool for drafter in (own, *loaded.values())]
    by_hand, of_dflash, of_causal_lm = [pool.capacity_tokens for pool in pools if pool]
    assert of_dflash == by_hand
    assert of_causal_lm == 2**20 // 512, "2 heads of 8 keys and values in 4 layers, four bytes each"


class Reader:
    """Hands out states of targets that note whether they were closed, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_open = 0
        self.mirrors = SimpleNamespace()

    def open(self, spec: TargetStateSpec, max_length: int, projection: object) -> Any:
        if self.error:
            raise self.error
        self.num_open += 1
        return self

    async def close(self) -> None:
        self.num_open -= 1


@pytest.mark.parametrize("drafter", [dflash], indirect=True)
async def test_a_session_gives_everything_back_whatever_fails(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = drafter.kv_pool
    assert pool
    request = OpenDraft(PROMPT, len(PROMPT), 40)

    async def failing_session(host: DrafterHost) -> None:
        async with host.open(drafter, request):
            assert (reader.num_open, host.num_sessions) == (1, 1)
            assert pool.free_tokens < pool.capacity_tokens
            raise UnavailableError("gone")

    for reader in (Reader(), Reader(UnavailableError("gone"))):
        host = DrafterHost({"it": drafter}, DrafterConfig(), reader=reader)  # type: ignore[arg-type]
        with pytest.raises(UnavailableError):
            await failing_session(host)
        assert (reader.num_open, host.num_sessions) == (0, 0)
        assert pool.free_tokens == pool.capacity_tokens
        host.close()

    def close(session: DraftSession) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(drafter, "close", close)
    reader = Reader()
    host = DrafterHost({"it": drafter}, DrafterConfig(), reader=reader)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a defect"):
        async with host.open(drafter, request):
            assert reader.num_open == 1
    assert (reader.num_open, host.num_sessions) == (0, 0)
    host.close()


async def test_drafts_go_between_the_parts_of_a_long_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = dflash(tmp_path)
    weights, long_prompt = target_weights(drafter), tuple(range(30))
    expected = propose(drafter, session(drafter, weights, long_prompt), session(drafter, weights))
    steps: list[list[tuple[bool, int, int]]] = []
    original = drafter.propose

    def noted(items: Sequence[DraftItem]) -> Sequence[list[int] | SpecdecError]:
        steps.append([(item.session is long, item.draft_depth, item.num_tokens) for item in items])
        return original(items)

    monkeypatch.setattr(drafter, "propose", noted)
    host = DrafterHost({"it": drafter}, DrafterConfig(prefill_chunk_tokens=8))
    long, short = session(drafter, weights, long_prompt), session(drafter, weights)
    drafts = await asyncio.gather(*(host.propose(drafter, opened, K) for opened in (long, short)))
    host.close()
    assert [list(draft.value.token_ids) for draft in drafts] == expected
    own = [entry for step in steps for entry in step if entry[0]]
    assert own == [(True, 0, 8), (True, 0, 8), (True, 0, 8), (True, K, 6)]
    (turn,) = (index for index, step in enumerate(steps) if (False, K, 6) in step)
    assert turn < len(steps) - 1


def test_a_session_without_the_right_state_fails_alone(drafter: Drafter) -> None:
    weights = target_weights(drafter)
    (expected,) = propose(drafter, session(drafter, weights))
    empty, bare = (session(drafter, weights) for _ in range(2))
    empty.view = state(drafter, 0)
    assert bare.view is not None
    bare.view = TargetStateView(bare.view.spec, {}, (), KvAllocation.of([0], torch.device("cpu")), 5)
    outcomes = propose(drafter, empty, session(drafter, weights), bare, session(drafter, weights))
    assert outcomes[1::2] == [expected, expected]
    assert isinstance(outcomes[0], FailedPreconditionError)
    assert isinstance(outcomes[2], InternalError)


def test_sessions_of_another_target_keep_their_drafts(drafter: Drafter) -> None:
    weights, broken = target_weights(drafter), target_weights(drafter, head_width=7)
    (expected,) = propose(drafter, session(drafter, weights))
    sessions = [session(drafter, given) for given in (broken, weights, broken, weights)]
    outcomes = propose(drafter, *sessions)
    assert outcomes[1::2] == [expected, expected]
    assert all(isinstance(outcome, InternalError) for outcome in outcomes[0::2])
    assert "failed" in str(outcomes[0])
