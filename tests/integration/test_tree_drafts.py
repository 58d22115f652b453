"""Trees of MTP and DFlash drafters: the text is the target's, and what they draft next is also right: they
read the state of the path that was accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter_service.drafters.base import Drafted, Drafter, DraftItem
from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from drafter_service.drafters.dflash.drafter import DFlashDrafter
from drafter_service.drafters.mtp.checkpoint import Assistant
from drafter_service.drafters.mtp.drafter import MtpDrafter
from drafter_service.families import FAMILIES, DrafterFactory
from specdec.client import GenerateOptions
from specdec.contract.draft_tree import ANCHOR, DraftTree
from specdec.contract.errors import SpecdecError
from specdec.contract.sampling import SamplingParams
from tests.integration import test_dflash, test_mtp
from tests.slow import quick_only
from tests.systems import running_system
from tests.tiny_assistants import save_narrow_pair
from tests.tiny_dflash import save_tiny_dflash

K, NUM_NODES, NUM_TOKENS = 4, 14, 60
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=4),
    SamplingParams(temperature=0.8, top_p=0.9, presence_penalty=0.4, seed=5),
]
Record = tuple[tuple[int, ...], int, DraftTree]
"""Committed tokens, how deep a tree was wanted after them, and the tree."""


class RecordedMtp(MtpDrafter):
    """Keeps its drafts."""

    recorder: Recorder

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        return self.recorder.recorded(items, super().propose(items))


class RecordedDFlash(DFlashDrafter):
    """Keeps its drafts."""

    recorder: Recorder

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted | SpecdecError]:
        return self.recorder.recorded(items, super().propose(items))


@dataclass
class Recorder:
    """Families of drafters that keep their trees."""

    records: list[Record] = field(default_factory=list)
    chains: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)
    """Where no tree was wanted, by committed tokens and how many were."""

    def recorded(
        self, items: Sequence[DraftItem], drafts: list[Drafted | SpecdecError]
    ) -> list[Drafted | SpecdecError]:
        for item, draft in zip(items, drafts, strict=True):
            committed = tuple(item.session.token_ids)
            if isinstance(draft, DraftTree):
                assert item.wants_tree
                assert len(draft) <= item.draft_nodes
                assert draft.depth <= item.draft_depth
                self.records.append((committed, item.draft_depth, draft))
            elif item.draft_depth:
                assert isinstance(draft, list)
                assert not item.wants_tree
                self.chains[committed, item.draft_depth] = draft
        return drafts

    @property
    def families(self) -> Mapping[str, DrafterFactory]:
        def mtp(spec: Any, config: Any) -> Drafter:
            drafter = RecordedMtp(
                spec.name,
                Assistant.load(spec.model, dtype="float32", device="cpu"),
                max_draft_depth=config.max_draft_depth,
            )
            drafter.recorder = self
            return drafter

        def dflash(spec: Any, config: Any) -> Drafter:
            drafter = RecordedDFlash(
                spec.name,
                DFlashCheckpoint.load(spec.model, dtype="float32", device="cpu"),
                kv_budget_bytes=2**20,
                max_draft_depth=config.max_draft_depth,
            )
            drafter.recorder = self
            return drafter

        return {**FAMILIES, "mtp": mtp, "dflash": dflash}


@dataclass(frozen=True)
class Case:
    """A target, a drafter, and the drafter's chains as transformers makes them."""

    target: Path
    drafter: str
    chain: Callable[[Sequence[int], int], Sequence[int]]


def mtp_case(folder: Path, family: str) -> Case:
    target, assistant = save_narrow_pair(folder, family)
    return Case(target, f"mtp:{assistant}", test_mtp.ByHand(target, assistant).draft)


def dflash_case(folder: Path, family: str) -> Case:
    target, drafter = test_dflash.save_pair(folder, family, seed=test_dflash.SEEDS[family])
    by_hand = test_dflash.ByHand(target, drafter)
    return Case(
        target, f"dflash:{drafter}", lambda committed, num: by_hand.logits(committed, num).argmax(-1).tolist()
    )


CASES = [
    (mtp_case, "gemma4"),
    (mtp_case, "gemma4-shared-kv"),
    (dflash_case, "llama"),
    (dflash_case, "gemma4"),
]


def along_the_best(tree: DraftTree) -> list[int]:
    """Return the tokens from child to best child, as far as the tree goes."""
    path, node = [], ANCHOR
    while node in tree.parents:
        node = list(tree.parents).index(node)  # siblings come best first
        path.append(tree.token_ids[node])
    return path


@pytest.mark.parametrize(
    ("make", "family", "mode"),
    quick_only(
        [(*case, mode) for case in CASES for mode in ("handle", "stream")],
        [(mtp_case, "gemma4", "stream"), (dflash_case, "llama", "handle")],
    ),
)
async def test_trees_are_right_round_after_round(
    make: Callable[[Path, str], Case], family: str, mode: str, tmp_path: Path
) -> None:
    case, recorder = make(tmp_path, family), Recorder()
    method = case.drafter.partition(":")[0]
    options = {"draft_depth": K, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    async with running_system(
        case.target,
        case.drafter,
        "ngram",
        families=recorder.families,
        drafter_options={"target_state": mode, "target": str(case.target)},
    ) as system:
        num_moved = 0
        for sampling in SAMPLINGS:
            prompt, common = test_mtp.PROMPT, {**options, "sampling": sampling}
            plain = await system.client.generate(
                prompt, GenerateOptions(**{**common, "draft_depth": None}, method="none")
            )
            for name in (method, f"{method}+ngram"):
                recorder.records.clear()
                answer = await system.client.generate(
                    prompt, GenerateOptions(**common, method=name, draft_nodes=NUM_NODES)
                )
                assert answer.token_ids == plain.token_ids, (name, sampling)
                assert answer.speculation.num_fallback_rounds == 0
                assert not any(part.num_fallback_rounds for part in answer.speculation.proposers)
                assert len(recorder.records) > 3
                for committed, num_wanted, tree in recorder.records:
                    best = along_the_best(tree)
                    if sampling.is_greedy:
                        chain = case.chain(committed, num_wanted)
                        assert best == list(chain[: len(best)]), len(committed)
                    rest = [*prompt, *plain.token_ids][len(committed) :]
                    num_moved += any(
                        parent == ANCHOR and token_id == rest[0] and index
                        for index, (parent, token_id) in enumerate(
                            zip(tree.parents, tree.token_ids, strict=True)
                        )
                        if rest
                    )
        assert num_moved > 3, "another path than the first was accepted now and then"


async def test_the_tree_of_a_markov_head_has_its_chain(tmp_path: Path) -> None:
    case, recorder = dflash_case(tmp_path, "llama"), Recorder()
    weights = tmp_path / "drafter" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    sizes = {"markov.state.weight": (12, 32), "markov.token.weight": (12, 32), "markov.out.weight": (32, 12)}
    random = {name: torch.randn(size, generator=generator) * 0.5 for name, size in sizes.items()}
    save_file({**load_file(weights), **random}, weights, metadata={"format": "pt"})
    options = {"method": "dflash", "draft_depth": K, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    async with running_system(case.target, case.drafter, families=recorder.families) as system:
        await system.client.generate(test_mtp.PROMPT, GenerateOptions(**options))
        for sampling in SAMPLINGS:
            options["sampling"] = sampling
            plain = await system.client.generate(
                test_mtp.PROMPT, GenerateOptions(**{**options, "method": "none", "draft_depth": None})
            )
            answer = await system.client.generate(
                test_mtp.PROMPT, GenerateOptions(**options, draft_nodes=NUM_NODES)
            )
            assert answer.token_ids == plain.token_ids
            assert answer.speculation.num_fallback_rounds == 0
            if sampling.is_greedy:
                both = [record for record in recorder.records if record[:2] in recorder.chains]
                assert len(both) > 3
                for committed, num_wanted, tree in both:
                    best = along_the_best(tree)
                    assert best == recorder.chains[committed, num_wanted][: len(best)]


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_drafters_that_read_different_state_draft_together(mode: str, tmp_path: Path) -> None:
    case, block = mtp_case(tmp_path, "gemma4"), save_tiny_dflash(tmp_path / "dflash", seed=1)
    options = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    async with running_system(
        case.target,
        *(case.drafter, f"dflash:{block}", "ngram"),
        drafter_options={"target_state": mode, "target": str(case.target)},
    ) as system:
        plain = await system.client.generate(test_mtp.PROMPT, GenerateOptions(**options, method="none"))
        for num_nodes in (0, 24):
            answer = await system.client.generate(
                test_mtp.PROMPT,
                GenerateOptions(**options, method="mtp+dflash+ngram", draft_nodes=num_nodes),
            )
            assert answer.token_ids == plain.token_ids
            assert not any(part.num_fallback_rounds for part in answer.speculation.proposers)
            assert all(proposer.num_draft_tokens for proposer in answer.speculation.proposers)


async def test_a_tree_accepts_more_than_a_chain(tmp_path: Path) -> None:
    case = dflash_case(tmp_path, "llama")
    options = {"method": "dflash", "draft_depth": K, "max_new_tokens": 150, "ignore_eos": True}
    async with running_system(case.target, case.drafter) as system:
        chain, tree = [
            await system.client.generate(test_mtp.PROMPT, GenerateOptions(**options, draft_nodes=num_nodes))
            for num_nodes in (0, NUM_NODES)
        ]
    assert chain.token_ids == tree.token_ids
    assert tree.speculation.mean_acceptance_length > chain.speculation.mean_acceptance_length
    assert tree.speculation.num_draft_tokens > sum(tree.speculation.num_draft_tokens_per_position)
