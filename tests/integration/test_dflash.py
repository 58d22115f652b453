"""DFlash drafting: the drafts are those of transformers' own drafter, by handle and by stream, whatever the
checkpoint's format; and the text is the target's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MuseGlimmerAssistantModel
from transformers.cache_utils import DFlashCache
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafted, Drafter, DraftItem
from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from drafter_service.drafters.dflash.drafter import DFlashDrafter
from drafter_service.drafters.head import DraftHead
from drafter_service.families import FAMILIES, DrafterFactory, load_drafters
from specdec.client import GenerateOptions
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import InvalidArgumentError, SpecdecError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import StateStorage
from tests.slow import quick_only
from tests.systems import System, running_system
from tests.tiny_assistants import NARROW, narrow
from tests.tiny_dflash import (
    BLOCK_SIZE,
    MASK_TOKEN_ID,
    SLIDING_WINDOW,
    qwen3_config,
    save_as_speculators,
    save_as_z_lab,
    save_tiny_dflash,
)
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

PROMPT = [*NARROW, 9, 65, 66, 66, 10, 67, 65, 11, 66] * 2
NUM_TOKENS = 48
"""Of an answer: four sliding windows."""
K = BLOCK_SIZE - 1
SEEDS = {"llama": 1, "qwen3": 10, "gemma4": 1}
"""Of drafters whose drafts these targets accept now and then."""
MODES = {
    "handle": (StateStorage.SHARED_MEMORY, {"target_state": "handle"}),
    "projected": (StateStorage.STREAM, {"target_state": "stream", "stream_features": "projected"}),
    "raw": (StateStorage.STREAM, {"target_state": "stream", "stream_features": "raw"}),
}


@dataclass
class DraftRecord:
    """A draft, what it followed, and the head's logits."""

    committed: tuple[int, ...]
    draft: tuple[int, ...]
    num_wanted: int
    storage: StateStorage
    logits: Tensor | None = None  # [num_drafts, draft_vocab_size]


class RecordedDFlash(DFlashDrafter):
    """Keeps what it drafted, and from which logits where it drafted for one session alone."""

    records: list[DraftRecord]

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        head, seen = self._head, []

        def logits(states: Tensor, weights: Any) -> Tensor:
            seen.append(DraftHead.logits(head, states, weights))
            return seen[-1]

        head.logits = logits  # type: ignore[method-assign]
        drafts = super().propose(items)
        for item, draft in zip(items, drafts, strict=True):
            assert isinstance(draft, list | DraftTree), draft
            if isinstance(draft, DraftTree):  # the gateway tries trees, where the size is its choice
                continue
            assert item.session.state is not None
            assert item.session.state.link is not None
            committed = tuple(item.session.token_ids)
            storage = item.session.state.link.storage
            own = seen[0] if len(items) == 1 and seen else None
            record = DraftRecord(committed, tuple(draft), item.draft_depth, storage, own)
            self.records.append(record)
        return drafts


@dataclass
class Recorder:
    """A family of recorded DFlash drafters."""

    records: list[DraftRecord] = field(default_factory=list)

    @property
    def families(self) -> Mapping[str, DrafterFactory]:
        def make(spec: Any, config: Any) -> Drafter:
            checkpoint = DFlashCheckpoint.load(spec.model, dtype="float32", device="cpu")
            drafter = RecordedDFlash(spec.name, checkpoint, kv_budget_bytes=2**20, max_draft_depth=16)
            drafter.records = self.records
            return drafter

        return {**FAMILIES, "dflash": make}

    @property
    def drafts(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The drafts by committed tokens."""
        return {record.committed: record.draft for record in self.records}


class ByHand:
    """Target and drafter as transformers has them, called on committed tokens from nothing."""

    def __init__(self, target: Path, drafter: Path) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.drafter = MuseGlimmerAssistantModel.from_pretrained(drafter, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(
        self, committed: Sequence[int], num_drafts: int, masks: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the logits [num_drafts, vocab_size] at the masks of a block after committed tokens.

        Args:
            masks: by layer type, which keys the block's rows see [num_drafts + 1, num_keys].
        """
        logits: Tensor = self.target.get_output_embeddings()(self.states(committed, num_drafts, masks))
        return logits

    @torch.no_grad()
    def states(
        self, committed: Sequence[int], num_drafts: int, masks: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return what the head reads at the masks [num_drafts, hidden_size]."""
        layer_ids = self.drafter.config.target_layer_ids
        hidden = self.target(torch.tensor([committed[:-1]]), output_hidden_states=True).hidden_states
        context = torch.cat([hidden[layer_id + 1] for layer_id in layer_ids], dim=-1)
        cache = DFlashCache(config=self.drafter.config)
        cache.set_previous_accepted_tokens(context.shape[1])
        block = torch.tensor([[committed[-1], *[MASK_TOKEN_ID] * num_drafts]])
        states = self.drafter(
            noise_embeds=self.target.get_input_embeddings()(block),
            context_hidden_states=context,
            past_key_values=cache,
            position_ids=torch.arange(len(committed) + num_drafts)[None],
            attention_mask={kind: mask[None, None] for kind, mask in masks.items()} if masks else None,
        ).last_hidden_state
        own: Tensor = states[0, 1:]
        return own

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
        output = self.target.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            **options,
        )
        token_ids: list[int] = output[0, len(prompt) :].tolist()
        return token_ids


def save_pair(folder: Path, family: str = "llama", **config: Any) -> tuple[Path, Path]:
    """Save a target that nearly always chooses one of NARROW, and a drafter with the target's head."""
    target = save_tiny_model(folder / "target", family)
    narrow(target)
    return target, save_tiny_dflash(folder / "drafter", **config)


async def generate(system: System, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    defaults = {"method": "dflash", "draft_depth": K, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    result = await system.client.generate(prompt, GenerateOptions(**(defaults | options)))
    assert result.speculation.num_fallback_rounds == 0
    assert result.speculation.method == (defaults | options)["method"]
    return list(result.token_ids)


async def drafts_of(
    target: Path, drafter: Path, *, drafter_options: Mapping[str, Any] | None = None, **options: Any
) -> Recorder:
    """Return what the drafter drafts for the prompt, and check that the text is the target's."""
    recorder = Recorder()
    async with running_system(
        target, f"dflash:{drafter}", families=recorder.families, drafter_options=drafter_options
    ) as system:
        plain = await generate(system, method="none", draft_depth=None)
        assert await generate(system, **options) == plain
    return recorder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SEEDS)
async def test_drafts_are_those_of_transformers(family: str, mode: str, tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path, family, seed=SEEDS[family])
    by_hand, recorder = ByHand(target, drafter), Recorder()
    storage, options = MODES[mode]
    async with running_system(
        target,
        f"dflash:{drafter}",
        families=recorder.families,
        drafter_options=options | {"target": str(target)},
    ) as system:
        assert await generate(system) == by_hand.greedy(PROMPT, NUM_TOKENS)
    assert len(recorder.records) > 5
    rounds = pairwise(recorder.records)
    accepted = [after.committed[len(before.committed)] == before.draft[0] for before, after in rounds]
    assert any(accepted)
    assert not all(accepted)
    for record in recorder.records:
        assert record.storage is storage
        expected = by_hand.logits(record.committed, record.num_wanted)
        assert record.logits is not None
        torch.testing.assert_close(record.logits, expected[: len(record.draft)], atol=2e-4, rtol=2e-4)
        assert record.draft == tuple(expected.argmax(-1).tolist())


async def test_drafts_are_those_of_transformers_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = save_pair(tmp_path)
    by_hand, proposed = ByHand(target, drafter), {}
    original = DFlashTokenCandidateGenerator.get_candidates

    def get_candidates(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        candidates, logits = original(self, input_ids, *args, **options)
        proposed[tuple(input_ids[0].tolist())] = tuple(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", get_candidates)
    text = by_hand.greedy(PROMPT, NUM_TOKENS, assistant_model=by_hand.drafter, speculation_type="dflash")
    recorder = await drafts_of(target, drafter)
    assert (
        recorder.records[-1].committed[len(PROMPT) :]
        == tuple(text)[: len(recorder.records[-1].committed) - len(PROMPT)]
    )
    whole = [record for record in recorder.records if len(record.draft) == K]
    assert len(whole) > 5
    for record in whole:
        assert record.draft == proposed[record.committed]


@pytest.mark.parametrize("kind", ["z-lab", "z-lab, older", "speculators"])
async def test_formats_hold_the_same_drafter(kind: str, tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path, layer_types=["full_attention"] * 2)
    other = tmp_path / "other"
    if kind == "speculators":
        save_as_speculators(drafter, other)
    else:
        save_as_z_lab(drafter, other, nested=kind == "z-lab")
    assert (await drafts_of(target, other)).drafts == (await drafts_of(target, drafter)).drafts


async def test_a_checkpoint_may_say_how_much_it_drafts(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path, layer_types=["full_attention"] * 2)
    config = {"block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID, "target_layer_ids": [0, 2]}
    usual = save_as_z_lab(drafter, tmp_path / "usual", dflash_config=config)
    short = save_as_z_lab(drafter, tmp_path / "short", dflash_config=config | {"default_draft_depth": 2})
    for folder, expected in ((usual, K), (short, 2)):
        # Later rounds ask for what has paid until then.
        records = (await drafts_of(target, folder, draft_depth=None)).records
        assert records[0].num_wanted == expected
    assert max(map(len, (await drafts_of(target, short)).drafts.values())) == K


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"default_draft_depth": 2}, 2),
        ({"default_num_draft_tokens": 3}, 3),
        ({"default_draft_depth": 2, "default_num_draft_tokens": 3}, 2),
        ({}, K),
    ],
    ids=["new key", "old key", "both", "neither"],
)
def test_the_default_depth_has_an_old_key(keys: dict[str, int], expected: int, tmp_path: Path) -> None:
    config = {"block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID, "target_layer_ids": [0, 2]}
    folder = save_as_z_lab(
        save_tiny_dflash(tmp_path / "muse"), tmp_path / "z-lab", dflash_config=config | keys
    )
    checkpoint = DFlashCheckpoint.load(str(folder), dtype="float32", device="cpu")
    traits = DFlashDrafter("d", checkpoint, kv_budget_bytes=2**20, max_draft_depth=16).traits
    assert (traits.max_draft_depth, traits.default_draft_depth) == (K, expected)


@pytest.mark.parametrize("causal", [None, False])
async def test_windows_as_z_lab_and_speculators_have_them(causal: bool | None, tmp_path: Path) -> None:
    """A window counts the query's own position, and makes a block causal unless the config says otherwise."""
    target, source = save_pair(tmp_path)
    z_lab = save_as_z_lab(source, tmp_path / "a", **({} if causal is None else {"is_causal": causal}))
    speculators = save_as_speculators(source, tmp_path / "b", sliding_window_non_causal=causal is False)
    by_hand = ByHand(target, source)
    for drafter in (z_lab, speculators):
        records = (await drafts_of(target, drafter)).records
        assert len(records) > 5
        for record in records:
            keys = torch.arange(len(record.committed) + record.num_wanted)
            distances = keys[len(record.committed) - 1 :, None] - keys
            sliding = distances < SLIDING_WINDOW
            if causal is None:
                sliding &= distances >= 0
            masks = {"sliding_attention": sliding, "full_attention": torch.ones_like(sliding)}
            expected = by_hand.logits(record.committed, record.num_wanted, masks)
            assert record.draft == tuple(expected.argmax(-1).tolist())


@pytest.mark.parametrize("off", [{"use_sliding_window": False}, {"use_sliding_window": None}])
async def test_sliding_layers_whose_window_is_off_see_all_of_the_context(
    off: dict[str, Any], tmp_path: Path
) -> None:
    target, source = save_pair(tmp_path)
    drafter = save_as_z_lab(source, tmp_path / "off")
    _change_config(drafter, **off)
    by_hand = ByHand(target, source)
    for record in (await drafts_of(target, drafter)).records:
        keys = torch.arange(len(record.committed) + record.num_wanted)
        causal = keys[len(record.committed) - 1 :, None] >= keys
        masks = {"sliding_attention": causal, "full_attention": torch.ones_like(causal)}
        expected = by_hand.logits(record.committed, record.num_wanted, masks)
        assert record.draft == tuple(expected.argmax(-1).tolist())


async def test_a_speculator_with_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    target, source = save_pair(tmp_path, layer_types=["full_attention"] * 2)
    token_ids = torch.tensor([0, 3, *NARROW, 120, 255])
    head = torch.randn(len(token_ids), 32)
    extra = {"lm_head.weight": head, "d2t": token_ids - torch.arange(len(token_ids))}
    extra["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, token_ids, True)
    extra["embed_tokens.weight"] = torch.zeros(VOCAB_SIZE, 32)
    drafter = save_as_speculators(source, tmp_path / "own", extra, draft_vocab_size=len(token_ids))
    by_hand = ByHand(target, source)
    by_hand.target.lm_head.weight = torch.nn.Parameter(head)
    records = (await drafts_of(target, drafter)).records
    for record in records:
        rows = by_hand.logits(record.committed, record.num_wanted).argmax(-1)
        assert record.draft == tuple(token_ids[rows].tolist())
    assert len({token for record in records for token in record.draft}) > 2


async def test_a_speculator_that_drafts_at_the_anchor(tmp_path: Path) -> None:
    target, source = save_pair(tmp_path, layer_types=["full_attention"] * 2)
    shifted = save_as_speculators(source, tmp_path / "anchor", sample_from_anchor=True)
    usual = save_as_speculators(source, tmp_path / "mask")
    at_anchor = (await drafts_of(target, shifted, draft_depth=BLOCK_SIZE)).records
    at_mask = (await drafts_of(target, usual)).drafts
    compared = 0
    for record in at_anchor:
        if len(record.draft) == BLOCK_SIZE and record.committed in at_mask:
            # The same block: its masks' picks are the same, and the anchor's come before them.
            assert record.draft[1:] == at_mask[record.committed]
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("family", quick_only(["llama", "gemma3", "gemma4-shared-kv"], ["gemma3"]))
async def test_sampled_text_is_that_of_plain_decoding(family: str, tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path, family)
    async with running_system(target, f"dflash:{drafter}") as system:
        for seed in range(3):
            sampling = SamplingParams(temperature=1.0, seed=seed)
            plain = await generate(system, method="none", draft_depth=None, sampling=sampling)
            for num_drafts in (1, 3, K):
                assert await generate(system, sampling=sampling, draft_depth=num_drafts) == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_sessions_drafted_together_get_the_drafts_they_get_alone(
    temperature: float, tmp_path: Path
) -> None:
    target, drafter = save_pair(tmp_path)
    prompts = [PROMPT[shift:] for shift in (0, 3, 5, 8)]
    sampling = SamplingParams(temperature=temperature, seed=1)
    alone, together = Recorder(), Recorder()
    async with running_system(target, f"dflash:{drafter}", families=alone.families) as system:
        expected = [await generate(system, prompt, sampling=sampling) for prompt in prompts]
    async with running_system(target, f"dflash:{drafter}", families=together.families) as system:
        answers = (generate(system, prompt, sampling=sampling) for prompt in prompts)
        assert await asyncio.gather(*answers) == expected
    assert alone.drafts == together.drafts


async def test_a_long_context_is_read_in_parts(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path)
    whole = await drafts_of(target, drafter)
    parts = await drafts_of(target, drafter, drafter_options={"prefill_chunk_tokens": 5})
    assert parts.drafts == whole.drafts
    assert [record.num_wanted for record in parts.records][:5] == [0, 0, 0, 0, K]
    assert all(record.num_wanted for record in whole.records)


async def test_drafts_end_where_the_drafter_is_not_sure(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path)
    off = (await drafts_of(target, drafter)).records
    some = (await drafts_of(target, drafter, min_draft_confidence=0.6)).records
    full = (await drafts_of(target, drafter, min_draft_confidence=1.0)).records
    assert all(len(record.draft) == min(K, record.num_wanted) for record in off)
    assert all(len(record.draft) == 1 for record in full)
    assert 1 < sum(len(record.draft) for record in some) / len(some) < K


async def test_drafters_of_other_targets_cost_the_drafts_alone(tmp_path: Path) -> None:
    target = save_tiny_model(tmp_path / "target", "llama")
    deep = save_tiny_dflash(tmp_path / "deep", target_layer_ids=[1, 4])
    wide = save_tiny_dflash(tmp_path / "wide", hidden_size=48)
    masked = save_tiny_dflash(tmp_path / "masked", mask_token_id=VOCAB_SIZE)
    drafters = (f"deep=dflash:{deep}", f"wide=dflash:{wide}", f"masked=dflash:{masked}")
    messages = {"deep": "hidden.4", "wide": "values", "masked": f"{VOCAB_SIZE + 1} tokens"}
    async with running_system(target, *drafters) as system:
        plain = await system.client.generate(PROMPT, GenerateOptions(method="none", max_new_tokens=12))
        for method, message in messages.items():
            result = await system.client.generate(PROMPT, GenerateOptions(method=method, max_new_tokens=12))
            assert result.token_ids == plain.token_ids
            assert result.speculation.num_draft_tokens == 0
            assert message in result.speculation.fallback_reason
        host = system.drafter.servicer.host
        assert host is not None
        assert host.num_sessions == 0
        for drafter in host.drafters.values():
            assert isinstance(drafter, DFlashDrafter)
            assert drafter._pool.free_tokens == drafter._pool.capacity_tokens


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": None, "dflash_config": {"target_layer_ids": [0]}}, "no mask token"),
        ({"dflash_config": {"mask_token_id": 1}}, "target layers"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [-1]}}, "target layers"),
        (
            {"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0], "block_size": 1}},
            "block_size is 1",
        ),
        ({"architectures": ["DFlash2DraftModel"]}, "write --drafter dflash2:MODEL"),
        ({"attention_bias": True}, "biases"),
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks layers.2"),
        ({"num_hidden_layers": 1, "layer_types": None}, "unknown layers.1"),
        ({"hidden_size": 64}, "size mismatch"),
        ({"hidden_size": "wide"}, "config.json cannot be used"),
        ({"architectures": ["LlamaForCausalLM"], "dflash_config": None}, "it holds LlamaForCausalLM"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_as_z_lab(save_tiny_dflash(tmp_path / "source"), tmp_path / "drafter")
    DFlashCheckpoint.load(str(folder), dtype="float32", device="cpu")
    _change_config(folder, **changes)
    with pytest.raises(InvalidArgumentError, match=message):
        DFlashCheckpoint.load(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("window", [None, 0, -3])
def test_sliding_layers_without_a_window_are_refused(window: int | None, tmp_path: Path) -> None:
    source = save_tiny_dflash(tmp_path / "source")
    layers = qwen3_config(json.loads((source / "config.json").read_text())) | {"sliding_window": window}
    for folder in (
        save_as_z_lab(source, tmp_path / "on", sliding_window=window),
        save_as_z_lab(source, tmp_path / "off", sliding_window=window, use_sliding_window=False),
        save_as_speculators(source, tmp_path / "speculators", transformer_layer_config=layers),
    ):
        with pytest.raises(InvalidArgumentError, match=f"sliding_window is {window}"):
            DFlashCheckpoint.load(str(folder), dtype="float32", device="cpu")


def test_the_services_device_and_threads_are_used(tmp_path: Path) -> None:
    folder, before = save_tiny_dflash(tmp_path / "drafter"), torch.get_num_threads()
    try:
        load_drafters(DrafterConfig(drafter=(f"dflash:{folder}",), threads=2, kv_cache_mib=1.0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(InvalidArgumentError, match="'fast' cannot be used"):
        load_drafters(DrafterConfig(drafter=(f"dflash:{folder}",), device="fast"))


def test_a_head_has_a_row_for_every_token(tmp_path: Path) -> None:
    source = save_tiny_dflash(tmp_path / "source")
    head = {"lm_head.weight": torch.randn(VOCAB_SIZE + 4, 32)}
    padded = save_as_speculators(source, tmp_path / "padded", head)
    checkpoint = DFlashCheckpoint.load(str(padded), dtype="float32", device="cpu")
    assert torch.equal(checkpoint.lm_head, head["lm_head.weight"][:VOCAB_SIZE])  # type: ignore[arg-type]
    # A config of transformers' names no vocabulary.
    save_file(load_file(source / "model.safetensors") | head, source / "model.safetensors")
    assert (
        DFlashCheckpoint.load(str(source), dtype="float32", device="cpu").settings.vocab_size
        == VOCAB_SIZE + 4
    )


def test_damaged_speculators_are_refused(tmp_path: Path) -> None:
    source = save_tiny_dflash(tmp_path / "source")

    def load(folder: Path) -> None:
        DFlashCheckpoint.load(str(folder), dtype="float32", device="cpu")

    head = torch.zeros(3, 32)
    for index, offsets in enumerate(([0, 0], [0, -5, 0], [0, 0, VOCAB_SIZE], [0, 1, 0], [[0], [0], [0]])):
        extra = {"lm_head.weight": head, "d2t": torch.tensor(offsets)}
        with pytest.raises(InvalidArgumentError, match="d2t"):
            load(save_as_speculators(source, tmp_path / str(index), extra))
    heads = {"no d2t": head, "32 elements": torch.zeros(VOCAB_SIZE, 24), r"\[260\]": torch.zeros(VOCAB_SIZE)}
    heads[r"\[0, 32\]"] = torch.zeros(0, 32)
    for index, (message, wrong) in enumerate(heads.items()):
        with pytest.raises(InvalidArgumentError, match=message):
            load(save_as_speculators(source, tmp_path / f"head{index}", {"lm_head.weight": wrong}))
    kinds = {"projector_type": "domino", "shift_label": True, "speculators_model_type": "eagle3"}
    for name, value in kinds.items():
        with pytest.raises(InvalidArgumentError, match=name if value is True else str(value)):
            load(save_as_speculators(source, tmp_path / name, **{name: value}))
    (tmp_path / "0" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        load(tmp_path / "0")
    weights = load_file(source / "model.safetensors")
    weights["encoder.fc.weight"] = torch.zeros(32, 32)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"encoder\.fc"):
        load(source)
