"""MTP drafting: the drafts are those of transformers' own assistant on committed state, for every Gemma 4
target, by handle and by stream; and the text is the target's own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from drafter_service.drafters.base import Drafter, DraftItem
from drafter_service.drafters.mtp.checkpoint import Assistant
from drafter_service.drafters.mtp.drafter import MtpDrafter
from drafter_service.families import FAMILIES, DrafterFactory
from specdec.client import GenerateOptions
from specdec.contract.errors import InvalidArgumentError, SpecdecError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import StateStorage, TargetStateSpec
from tests.raw_streams import draft_stream, verify_stream
from tests.slow import quick_only
from tests.systems import System, running_system
from tests.tiny_assistants import FAMILIES as GEMMAS
from tests.tiny_assistants import NARROW, save_narrow_pair, save_tiny_assistant
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

PROMPT = [*NARROW, 9, 65, 66, 66, 10, 67, 65, 11, 66] * 2
NUM_TOKENS = 48
"""Of an answer: three sliding windows."""
K = 4
STORAGES = {"handle": StateStorage.SHARED_MEMORY, "stream": StateStorage.STREAM}


@dataclass(frozen=True)
class DraftRecord:
    """A draft, and what it followed."""

    committed: tuple[int, ...]
    draft: tuple[int, ...]
    num_wanted: int
    storage: StateStorage


class RecordedMtp(MtpDrafter):
    """Keeps what it drafted."""

    records: list[DraftRecord]

    def propose(self, items: Sequence[DraftItem]) -> list[list[int] | SpecdecError]:
        drafts = super().propose(items)
        for item, draft in zip(items, drafts, strict=True):
            assert isinstance(draft, list), draft
            assert item.session.state is not None
            assert item.session.state.link is not None
            committed = tuple(item.session.token_ids)
            storage = item.session.state.link.storage
            self.records.append(DraftRecord(committed, tuple(draft), item.draft_depth, storage))
        return drafts


@dataclass
class Recorder:
    """A family of recorded MTP drafters."""

    position: str = "anchor"
    records: list[DraftRecord] = field(default_factory=list)

    @property
    def families(self) -> Mapping[str, DrafterFactory]:
        def make(spec: Any, config: Any) -> Drafter:
            assistant = Assistant.load(spec.model, dtype="float32", device="cpu")
            drafter = RecordedMtp(spec.name, assistant, max_draft_depth=8, position=self.position)
            drafter.records = self.records
            return drafter

        return {**FAMILIES, "mtp": make}


class ByHand:
    """Target and assistant as transformers has them, called step by step on committed tokens."""

    def __init__(self, target: Path, assistant: Path) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.assistant = AutoModelForCausalLM.from_pretrained(assistant, dtype=torch.float32).eval()

    @torch.no_grad()
    def draft(self, committed: Sequence[int], num_tokens: int, offset: int = 0) -> tuple[int, ...]:
        """Return the draft of K steps after committed tokens, over the target's state of all but the last."""
        output = self.target(
            torch.tensor([committed[:-1]]), output_hidden_states=True, return_shared_kv_states=True
        )
        hidden: Tensor = output.hidden_states[-1][:, -1:]
        token_ids = list(committed[-1:])
        position_ids = torch.tensor([[len(committed) - 1 + offset]])
        for _ in range(num_tokens):
            embedding = self.target.get_input_embeddings()(torch.tensor([token_ids[-1:]]))
            step = self.assistant(
                inputs_embeds=torch.cat([embedding, hidden], dim=-1),
                position_ids=position_ids,
                shared_kv_states=output.shared_kv_states,
            )
            hidden = step.last_hidden_state
            token_ids.append(step.logits[0, -1].argmax().item())
        return tuple(token_ids[1:])

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        output = self.target.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )
        token_ids: list[int] = output[0, len(prompt) :].tolist()
        return token_ids


async def generate(system: System, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    defaults = {"method": "mtp", "draft_depth": K, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    result = await system.client.generate(prompt, GenerateOptions(**(defaults | options)))
    assert result.speculation.num_fallback_rounds == 0
    assert result.speculation.method == (defaults | options)["method"]
    return list(result.token_ids)


@pytest.mark.parametrize("mode", STORAGES)
@pytest.mark.parametrize("family", GEMMAS)
async def test_drafts_are_those_of_transformers_on_committed_state(
    family: str, mode: str, tmp_path: Path
) -> None:
    target, assistant = save_narrow_pair(tmp_path, family)
    by_hand, recorder = ByHand(target, assistant), Recorder()
    async with running_system(
        target,
        f"mtp:{assistant}",
        families=recorder.families,
        drafter_options={"target_state": mode, "target": str(target)},
    ) as system:
        token_ids = await generate(system)
    assert token_ids == by_hand.greedy(PROMPT, NUM_TOKENS)
    records = recorder.records
    assert {record.storage for record in records} == {STORAGES[mode]}
    for record in records:
        room = len(PROMPT) + NUM_TOKENS - len(record.committed) - 1
        assert record.draft == by_hand.draft(record.committed, min(K, room)), len(record.committed)
    # Refused drafts past the sliding window were rolled back, accepted ones kept.
    rounds = [len(b.committed) - len(a.committed) - 1 for a, b in pairwise(records)]
    assert max(rounds) > 0
    assert min(rounds[len(rounds) // 2 :]) < K
    assert len(records[-1].committed) > len(PROMPT) + 2 * 16


async def test_a_draft_ends_where_the_generation_does(tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, "gemma4")
    async with (
        running_system(target, f"mtp:{assistant}") as system,
        verify_stream(system.verifier_address) as verifying,
        draft_stream(system.drafter_address) as drafting,
    ):
        spec = TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True)
        opened = await verifying.open(
            PROMPT, max_new_tokens=20, ignore_eos=True, target_state_spec=spec.to_proto()
        )
        committed = list(verifying.token_ids)
        await drafting.open("mtp", committed, max_length=len(committed) + 2)
        state = opened.target_state
        assert len(await drafting.round([], len(committed), K, target_state=state)) == 2
        for num_left in (1, 0):
            state.cached_length = (await verifying.round()).cached_length
            new = verifying.token_ids[-1:]
            draft = await drafting.round(new, len(verifying.token_ids), K, target_state=state)
            assert len(draft) == num_left


@pytest.mark.parametrize("family", GEMMAS)
async def test_drafts_are_those_of_assisted_generation_where_nothing_was_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refusal transformers reads one stale entry of KV; otherwise its drafts equal the system's."""
    target, assistant = save_narrow_pair(tmp_path, family)
    by_hand, recorder = ByHand(target, assistant), Recorder()
    theirs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    original = SinglePositionMultiTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = original(self, input_ids, *args, **kwargs)
        length = input_ids.shape[1]
        if candidates.shape[1] > length:
            theirs.append((tuple(input_ids[0].tolist()), tuple(candidates[0, length:].tolist())))
        return candidates, logits

    monkeypatch.setattr(SinglePositionMultiTokenCandidateGenerator, "get_candidates", recorded)
    unrefused = []
    for num_tokens in (1, K):
        theirs.clear()
        by_hand.assistant.generation_config.num_assistant_tokens = num_tokens
        by_hand.target.generate(
            torch.tensor([PROMPT]),
            assistant_model=by_hand.assistant,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        unrefused += theirs[:1]
        for (before, draft), (after, next_draft) in pairwise(theirs):
            if after[: len(before) + len(draft)] == before + draft:
                unrefused.append((after, next_draft))
    assert len(unrefused) >= 3
    async with running_system(target, f"mtp:{assistant}", families=recorder.families) as system:
        for committed, draft in unrefused:
            recorder.records.clear()
            await generate(system, committed[:-1], max_new_tokens=len(draft) + 2)
            first = recorder.records[0]
            assert first.committed == committed
            assert first.draft[: len(draft)] == draft[: len(first.draft)]
            assert first.draft


@pytest.mark.parametrize("family", ["gemma4", "gemma4-shared-kv"])
async def test_the_other_convention_of_the_position(family: str, tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, family)
    by_hand, recorder = ByHand(target, assistant), Recorder(position="hidden")
    async with running_system(target, f"mtp:{assistant}", families=recorder.families) as system:
        await generate(system)
    drafts = [record.draft for record in recorder.records]
    assert drafts == [by_hand.draft(r.committed, len(r.draft), offset=-1) for r in recorder.records]
    assert drafts != [by_hand.draft(r.committed, len(r.draft)) for r in recorder.records]


@pytest.mark.parametrize("family", quick_only(GEMMAS, ["gemma4-shared-kv"]))
async def test_sampled_text_is_that_of_plain_decoding(family: str, tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, family)
    async with running_system(target, f"mtp:{assistant}") as system:
        for seed in range(3):
            sampling = SamplingParams(temperature=1.0, seed=seed)
            plain = await generate(system, method="none", draft_depth=None, sampling=sampling)
            assert await generate(system, sampling=sampling) == plain


@pytest.mark.parametrize("temperature", [0.0, 20.0])
@pytest.mark.parametrize("family", quick_only(["gemma4", "gemma4-shared-kv"], ["gemma4-shared-kv"]))
async def test_sessions_drafted_together_get_the_drafts_they_get_alone(
    family: str, temperature: float, tmp_path: Path
) -> None:
    target, assistant = save_narrow_pair(tmp_path, family)
    prompts = [PROMPT[shift:] for shift in (0, 3, 5, 8)]
    sampling = SamplingParams(temperature=temperature, seed=1)
    alone, together = Recorder(), Recorder()
    async with running_system(target, f"mtp:{assistant}", families=alone.families) as system:
        expected = [await generate(system, prompt, sampling=sampling) for prompt in prompts]
    async with running_system(target, f"mtp:{assistant}", families=together.families) as system:
        answers = (generate(system, prompt, sampling=sampling) for prompt in prompts)
        assert await asyncio.gather(*answers) == expected
    assert {r.committed: r.draft for r in alone.records} == {r.committed: r.draft for r in together.records}


async def test_drafts_end_where_the_drafter_is_not_sure(tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, "gemma4-moe")
    lengths = []
    async with AsyncExitStack() as stack:
        recorder = Recorder()
        system = await stack.enter_async_context(
            running_system(target, f"mtp:{assistant}", families=recorder.families)
        )
        for confidence in (0.0, 0.05, 1.0):
            recorder.records.clear()
            token_ids = await generate(system, min_draft_confidence=confidence)
            assert token_ids == ByHand(target, assistant).greedy(PROMPT, NUM_TOKENS)
            # The answer's end bounds the last drafts.
            lengths.append([len(r.draft) for r in recorder.records if len(r.committed) < len(PROMPT) + 40])
        for confidence in (-0.1, 1.1):
            with pytest.raises(InvalidArgumentError, match="min_draft_confidence"):
                await generate(system, min_draft_confidence=confidence)
    off, some, full = lengths
    assert set(off) == {K}
    assert set(full) == {1}
    assert 1 < sum(some) / len(some) < K


async def test_an_assistant_of_another_target_costs_the_drafts_alone(tmp_path: Path) -> None:
    target = save_tiny_model(tmp_path / "target", "gemma4")
    other = save_tiny_assistant(tmp_path / "other", "gemma4-unified")
    wide = save_tiny_assistant(tmp_path / "wide", "gemma4", backbone_hidden_size=48)
    wordy = save_tiny_assistant(tmp_path / "wordy", "gemma4", vocab_size=2 * VOCAB_SIZE)
    drafters = (f"other=mtp:{other}", f"wide=mtp:{wide}", f"wordy=mtp:{wordy}")
    messages = {"other": "full_attention KV", "wide": "48 elements", "wordy": f"{2 * VOCAB_SIZE} tokens"}
    async with running_system(target, *drafters) as system:
        plain = await system.client.generate(PROMPT, GenerateOptions(method="none", max_new_tokens=12))
        for method, message in messages.items():
            result = await system.client.generate(PROMPT, GenerateOptions(method=method, max_new_tokens=12))
            assert result.token_ids == plain.token_ids
            assert result.speculation.num_draft_tokens == 0
            assert "another target" in result.speculation.fallback_reason
            assert message in result.speculation.fallback_reason
        drafter = system.drafter.servicer.host
        assert drafter is not None
        assert drafter.num_sessions == 0


async def test_an_assistant_for_a_target_with_one_attention_type(tiny_llama: Path, tmp_path: Path) -> None:
    """Both attention types of the assistant read the only one of the target; its vocabulary may be a part of
    the target's.
    """
    assistant = save_tiny_assistant(tmp_path / "assistant", "llama")
    draft_vocab = torch.arange(3, VOCAB_SIZE, 5, dtype=torch.int32)
    save_file({"token_ids": draft_vocab}, assistant / "draft_vocab.safetensors")
    recorder = Recorder()
    async with running_system(tiny_llama, f"mtp:{assistant}", families=recorder.families) as system:
        plain = await generate(system, method="none", draft_depth=None)
        assert await generate(system) == plain
        sampling = SamplingParams(temperature=1.0, seed=3)
        sampled = await generate(system, method="none", draft_depth=None, sampling=sampling)
        assert await generate(system, sampling=sampling) == sampled
    drafted = {token for record in recorder.records for token in record.draft}
    assert len(drafted) > 5
    assert drafted <= set(draft_vocab.tolist())


async def test_ordered_embeddings_and_a_draft_vocabulary(tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, "gemma4-shared-kv")
    drafted_ids = sorted({*NARROW, *range(0, VOCAB_SIZE, 3)})
    save_file({"token_ids": torch.tensor(drafted_ids)}, assistant / "draft_vocab.safetensors")
    recorder = Recorder()
    async with running_system(target, f"mtp:{assistant}", families=recorder.families) as system:
        assert await generate(system) == await generate(system, method="none", draft_depth=None)
    assert {token for record in recorder.records for token in record.draft} <= set(drafted_ids)
    assert sum(len(record.draft) for record in recorder.records) > NUM_TOKENS


def test_checkpoints_that_are_no_assistants_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def load(folder: Path) -> Assistant:
        return Assistant.load(str(folder), dtype="float32", device="cpu")

    with pytest.raises(InvalidArgumentError, match="it holds LlamaForCausalLM"):
        load(tiny_llama)
    assistant = save_tiny_assistant(tmp_path / "assistant", "gemma4")
    weights = load_file(assistant / "model.safetensors")
    for token_ids in ([5, 3], [], [1, VOCAB_SIZE], [-1, 2]):
        save_file({"token_ids": torch.tensor(token_ids)}, assistant / "draft_vocab.safetensors")
        with pytest.raises(InvalidArgumentError, match="ascending ids"):
            load(assistant)
    (assistant / "draft_vocab.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        load(assistant)
    (assistant / "draft_vocab.safetensors").unlink()
    del weights["pre_projection.weight"]
    save_file(weights, assistant / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match="pre_projection"):
        load(assistant)
