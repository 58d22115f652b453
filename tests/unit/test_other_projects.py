"""Drafters give what other projects' own code gives, for checkpoints as those projects write them.

`tests/fixtures` holds small random checkpoints and what their code made of them; its README names the
projects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import CachedSession, Drafted, DraftItem, OpenDraft
from drafter_service.drafters.dflash.checkpoint import DFLASH, DFlashCheckpoint, Kind
from drafter_service.drafters.dflash.drafter import DFlashDrafter
from drafter_service.drafters.dflash.links import Places
from drafter_service.drafters.dflash2.checkpoint import DFLASH2
from drafter_service.drafters.dspark.checkpoint import DSPARK
from drafter_service.drafters.eagle3.checkpoint import EagleCheckpoint
from drafter_service.drafters.eagle3.drafter import EagleDrafter
from drafter_service.drafters.eagle3.rounds import Branch, EagleRound
from drafter_service.drafters.kinds import context_length, kind_of, why_other
from drafter_service.drafters.weights import read_weights
from drafter_service.families import load_drafters
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import InvalidArgumentError, SpecdecError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import hidden_name
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.state.view import TargetStateView
from specdec.state.weights import TargetWeights

FIXTURES = Path(__file__).parent.parent / "fixtures"
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
EAGLES = (
    "eagle3/d2t",
    "eagle3/full_vocab_theta",
    "eagle3-speculators/llama_d2t",
    "eagle3-speculators/llama_two_layers",
    "eagle3-speculators/qwen3_norms",
)
BLOCK_DRAFTERS: dict[str, Kind] = {
    "dflash-zlab/full": DFLASH,
    "dflash-zlab/sliding": DFLASH,
    "dflash-zlab/sliding_noncausal": DFLASH,
    "dflash-zlab/short_window": DFLASH,
    "speculators-dflash/full": DFLASH,
    "speculators-dflash/sliding_d2t": DFLASH,
    "speculators-dflash/noncausal_anchor": DFLASH,
    "dflash2/published": DFLASH2,
    "dflash2/taps3_softcap": DFLASH2,
    "dflash2/causal_unsaid": DFLASH2,
    "dspark/vanilla": DSPARK,
    "dspark/gated_d2t": DSPARK,
    "dspark/rnn_bonus_anchor": DSPARK,
    "dspark/sliding_d2t_bonus_anchor": DSPARK,
    "dspark-deepspec/qwen3_vanilla": DSPARK,
}
WINDOW_FROM_ANCHOR = {
    "speculators-dflash/sliding_d2t",
    "speculators-dflash/noncausal_anchor",
    "dspark/sliding_d2t_bonus_anchor",
}
"""Where the other project counts a window from the anchor, and this one from the row, as vLLM does: they
agree in sessions that are shorter than the window less the block."""


@dataclass
class Case:
    """One round of a session, as another project ran it."""

    name: str
    read: int
    length: int
    values: dict[str, Tensor]


class OtherProject:
    """A checkpoint, the target's states that it reads, and the rounds that another project ran with it."""

    def __init__(self, variant: str) -> None:
        self.folder = FIXTURES / variant
        target = load_file(self.folder.parent / "target.safetensors")
        self.hidden, self.token_ids = target["hidden_states"], target["token_ids"].tolist()
        own = load_file(self.folder / "model.safetensors")
        embedding = target.get("embedding", own.get("embed_tokens.weight"))
        head = target.get("lm_head", own.get("lm_head.weight"))
        assert embedding is not None
        assert head is not None
        self.weights = TargetWeights(embedding, head)
        self._values = load_file(self.folder / "case.safetensors")

    def sessions(self) -> dict[str, list[Case]]:
        """Return the rounds of every session, in order."""
        found: dict[str, list[Case]] = {}
        is_short = str(self.folder.relative_to(FIXTURES)) in WINDOW_FROM_ANCHOR
        names = {name.rsplit(".", 1)[0] for name in self._values if name.endswith(".context")}
        for name in sorted(names):
            values = {
                key.removeprefix(f"{name}."): value
                for key, value in self._values.items()
                if key.startswith(f"{name}.")
            }
            read, length = values["context"].tolist()
            if not is_short or length == 1:
                found.setdefault(name.split(".")[0], []).append(Case(name, read, length, values))
        assert found
        return found

    def view(self, drafter: DFlashDrafter | EagleDrafter, length: int) -> TargetStateView:
        """Return the target's state of a round."""
        spec = drafter.traits.target_state_spec
        assert spec is not None
        num_blocks = -(-len(self.token_ids) // BLOCK_TOKENS)
        tensors = {
            hidden_name(layer_id): torch.cat(
                [self.hidden[layer_id + 1], torch.zeros(num_blocks * BLOCK_TOKENS, self.hidden.shape[2])]
            )
            for layer_id in spec.hidden_layer_ids
        }
        allocation = KvAllocation.of(range(num_blocks), torch.device("cpu"))
        return TargetStateView(spec, tensors, [], allocation, length, drafter.projection)


def load(variant: str, kind: Kind) -> tuple[OtherProject, DFlashCheckpoint, DFlashDrafter]:
    other = OtherProject(variant)
    checkpoint = DFlashCheckpoint.load(str(other.folder), dtype="float32", device="cpu", kind=kind)
    drafter = DFlashDrafter("drafter", checkpoint, kv_budget_bytes=2**22, max_draft_depth=16)
    return other, checkpoint, drafter


def load_eagle(variant: str, dtype: str = "float32") -> tuple[OtherProject, EagleDrafter]:
    other = OtherProject(variant)
    checkpoint = EagleCheckpoint.load(
        str(other.folder), dtype=dtype, device="cpu", num_target_layers=len(other.hidden) - 1
    )
    return other, EagleDrafter("drafter", checkpoint, kv_budget_bytes=2**22, max_draft_depth=16)


def run_eagle(
    other: OtherProject, drafter: EagleDrafter, cases: Sequence[Case], *, num_nodes: int = 0
) -> Iterator[tuple[Case, Drafted, list[Tensor]]]:
    """Run the rounds of a session; yield what was drafted, and the logits that the picks were made from."""
    seen = list[Tensor]()
    logits = drafter._head.logits

    def recorded(states: Tensor, weights: TargetWeights) -> Tensor:
        seen.append(logits(states, weights))
        return seen[-1]

    drafter._head.logits = recorded  # type: ignore[method-assign]
    committed = other.token_ids[: cases[0].length + 1]
    session = drafter.open(OpenDraft(tuple(committed), len(committed), 60))
    session.target_weights = other.weights
    for case in cases:
        seen.clear()
        new = other.token_ids[len(session.token_ids) : case.length + 1]
        session.commit(new, case.length + 1)
        session.view = other.view(drafter, case.length)
        (drafted,) = drafter.propose(
            [DraftItem(drafter, session, len(case.values["draft_ids"]), 1, num_nodes)]
        )
        assert not isinstance(drafted, Exception), drafted
        yield case, drafted, seen
    drafter.close(session)


def run(
    other: OtherProject,
    drafter: DFlashDrafter,
    cases: Sequence[Case],
    *,
    num_nodes: int = 0,
    confidence: float = 0.0,
    temperature: float = 0.0,
) -> Iterator[tuple[Case, Drafted, Tensor]]:
    """Run the rounds of a session; yield what was drafted, and the states of the block."""
    seen: list[Tensor] = []
    draft = drafter._picker.draft

    def recorded(rounds: Sequence[object], states: Tensor, weights: TargetWeights) -> list[Drafted]:
        seen.append(states)
        return draft(rounds, states, weights)  # type: ignore[arg-type]

    drafter._picker.draft = recorded  # type: ignore[method-assign, assignment]
    committed = other.token_ids[: cases[0].length + 1]
    sampling = SamplingParams(temperature=temperature, seed=7 if temperature else None)
    session = drafter.open(OpenDraft(tuple(committed), len(committed), 60, sampling, confidence))
    session.target_weights = other.weights
    for case in cases:
        new = other.token_ids[len(session.token_ids) : case.length + 1]
        session.commit(new, case.length + 1)
        session.view = other.view(drafter, case.length)
        assert case.read in (0, session.num_cached)
        num_drafts = len(case.values["draft_ids"])
        (drafted,) = drafter.propose([DraftItem(drafter, session, num_drafts, 1, num_nodes)])
        assert not isinstance(drafted, Exception), drafted
        yield case, drafted, seen[-1]
    drafter.close(session)


@pytest.mark.parametrize("variant", BLOCK_DRAFTERS)
@torch.inference_mode()
def test_states_and_drafts_are_those_of_the_other_project(variant: str) -> None:
    other, _, drafter = load(variant, BLOCK_DRAFTERS[variant])
    for cases in other.sessions().values():
        for case, drafted, states in run(other, drafter, cases):
            torch.testing.assert_close(states, case.values["hidden"][: len(states)], **CLOSE)
            assert drafted == case.values["draft_ids"].tolist(), case.name


@pytest.mark.parametrize("variant", [name for name, kind in BLOCK_DRAFTERS.items() if kind is DSPARK])
@torch.inference_mode()
def test_biases_and_confidences_are_those_of_the_other_project(variant: str) -> None:
    other, checkpoint, drafter = load(variant, DSPARK)
    links, head = checkpoint.parts.links, drafter._head
    assert links is not None
    for cases in other.sessions().values():
        for case in cases:
            values, drafts = case.values, case.values["draft_ids"]
            first = len(values["hidden"]) - len(drafts)
            places = Places(
                values["hidden"][first:], values["block_ids"][:1], values["hidden"][:1] if first else None
            )
            walk = links.walk(places, head, other.weights)
            memory, before = walk.begin(), values["block_ids"][:1]
            for row, pick in enumerate(drafts):
                found = walk.follow(torch.tensor([row]), before, memory)
                torch.testing.assert_close(found.logits[0], values["biased_logits"][first + row], **CLOSE)
                assert found.confidence is not None
                expected = values["confidence_logits"][first + row].sigmoid()
                torch.testing.assert_close(found.confidence[0], expected, **CLOSE)
                memory, before = found.memory, pick[None]


@pytest.mark.parametrize("variant", BLOCK_DRAFTERS)
@torch.inference_mode()
def test_a_tree_holds_the_chain(variant: str) -> None:
    """The chain is a path of a tree that has room for it."""
    other, _, drafter = load(variant, BLOCK_DRAFTERS[variant])
    for cases in other.sessions().values():
        for case, drafted, _ in run(other, drafter, cases, num_nodes=60):
            assert isinstance(drafted, DraftTree)
            paths = {
                tuple(drafted.token_ids[at] for at in drafted.path_to(index)) for index in range(len(drafted))
            }
            assert tuple(case.values["draft_ids"][:2].tolist()) in paths


@pytest.mark.parametrize("variant", [name for name, kind in BLOCK_DRAFTERS.items() if kind is DSPARK])
@torch.inference_mode()
def test_a_draft_ends_before_the_first_place_that_is_not_sure(variant: str) -> None:
    other, _, drafter = load(variant, DSPARK)
    for cases in other.sessions().values():
        expected = [case.values["draft_ids"].tolist() for case in cases]
        sure = [
            case.values["confidence_logits"][-len(draft) :].sigmoid()
            for case, draft in zip(cases, expected, strict=True)
        ]
        threshold = float(torch.cat(sure).quantile(0.4))
        lengths = [
            max(1, next((at for at, own in enumerate(places) if own < threshold), len(places)))
            for places in sure
        ]
        for (_, drafted, _), draft, length in zip(
            run(other, drafter, cases, confidence=threshold), expected, lengths, strict=True
        ):
            assert drafted == draft[:length]


@pytest.mark.parametrize("variant", [name for name, kind in BLOCK_DRAFTERS.items() if kind is DFLASH2])
@torch.inference_mode()
def test_sampled_drafts_are_candidates(variant: str) -> None:
    other, _, drafter = load(variant, DFLASH2)
    for cases in other.sessions().values():
        for case, drafted, _ in run(other, drafter, cases, temperature=1.0):
            assert isinstance(drafted, list)
            for token_id, candidates in zip(drafted, case.values["candidate_ids"], strict=True):
                assert token_id in candidates


def test_sessions_side_by_side_do_not_touch_each_other() -> None:
    """Convolutions end where a block does."""
    other, _, drafter = load("dflash2/taps3_softcap", DFLASH2)
    alone, items = list[Drafted | SpecdecError](), list[DraftItem]()
    for length in (20, 9, 31):
        for is_alone in (True, False):
            committed = tuple(other.token_ids[: length + 1])
            session = drafter.open(OpenDraft(committed, len(committed), 60))
            session.target_weights, session.view = other.weights, other.view(drafter, length)
            items.append(DraftItem(drafter, session, 3 + length % 4, 1))
            if is_alone:
                alone += drafter.propose([items.pop()])
    assert drafter.propose(items) == alone


@pytest.mark.parametrize(
    ("kind", "variant", "message"),
    [
        (DFLASH, "dflash2/published", "it holds DFlash2DraftModel; write --drafter dflash2:MODEL"),
        (DFLASH, "dspark/vanilla", "it holds speculators' dspark; write --drafter dspark:MODEL"),
        (DFLASH, "dspark-deepspec/qwen3_vanilla", "it holds Qwen3DSparkModel; write --drafter dspark:MODEL"),
        (DFLASH, "eagle3/d2t", "it holds an EAGLE-3 head; write --drafter eagle3:MODEL"),
        (DFLASH2, "dflash-zlab/full", "it holds DFlashDraftModel; write --drafter dflash:MODEL"),
        (DSPARK, "dflash2/published", "it holds DFlash2DraftModel; write --drafter dflash2:MODEL"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_by_name(kind: Kind, variant: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        DFlashCheckpoint.load(str(FIXTURES / variant), dtype="float32", device="cpu", kind=kind)


@pytest.mark.parametrize("variant", EAGLES)
@torch.inference_mode()
def test_eagle_drafts_are_those_of_the_other_project(variant: str) -> None:
    """So layers are counted as the other project counts them: by what enters them."""
    other, drafter = load_eagle(variant)
    for cases in other.sessions().values():
        for case, drafted, logits in run_eagle(other, drafter, cases):
            torch.testing.assert_close(torch.cat(logits), case.values["logits"], **CLOSE)
            assert drafted == case.values["draft_ids"].tolist(), case.name


@pytest.mark.parametrize("variant", EAGLES)
@torch.inference_mode()
def test_an_eagle_tree_holds_the_chain(variant: str) -> None:
    other, drafter = load_eagle(variant)
    for cases in other.sessions().values():
        for case, drafted, _ in run_eagle(other, drafter, cases, num_nodes=60):
            assert isinstance(drafted, DraftTree)
            paths = {
                tuple(drafted.token_ids[at] for at in drafted.path_to(index)) for index in range(len(drafted))
            }
            assert tuple(case.values["draft_ids"][:2].tolist()) in paths


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_eagle_branches_are_chains_of_their_own(dtype: str) -> None:
    """A tree's step computes for a path what a chain that drafts this path computes."""
    other, drafter = load_eagle("eagle3-speculators/llama_two_layers", dtype)
    close = CLOSE if dtype == "float32" else {"atol": 0.05, "rtol": 0.05}
    case = other.sessions()["long"][0]
    committed = tuple(other.token_ids[: case.length + 1])

    def session() -> CachedSession:
        opened = drafter.open(OpenDraft(committed, len(committed), 60))
        opened.target_weights, opened.view = other.weights, other.view(drafter, case.length)
        return opened

    def start() -> tuple[EagleRound, Branch]:
        part = EagleRound(session(), case.length, 4, 16)
        (output,) = drafter._read([part.session], [case.length])
        return part, Branch(output, ())

    part, first = start()
    together = drafter._step([part], [[first, first]], [[5, 9]], other.weights)[0]
    deeper = drafter._step([part], [[together[1], together[0]]], [[7, 3]], other.weights)[0]
    for path, found in (([9, 7], deeper[0]), ([5, 3], deeper[1])):
        alone, branch = start()
        for token_id in path:
            ((branch,),) = drafter._step([alone], [[branch]], [[token_id]], other.weights)
        torch.testing.assert_close(found.feature, branch.feature, **close)


def test_an_eagle_that_does_not_say_what_it_reads_asks_for_the_target() -> None:
    with pytest.raises(InvalidArgumentError, match="give the target's checkpoint with --target"):
        EagleCheckpoint.load(str(FIXTURES / "eagle3/d2t"), dtype="float32", device="cpu")


def test_another_kind_is_not_an_eagle() -> None:
    with pytest.raises(
        InvalidArgumentError, match="it holds speculators' dspark; write --drafter dspark:MODEL"
    ):
        EagleCheckpoint.load(str(FIXTURES / "dspark/vanilla"), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("config", "called", "family"),
    [
        ({"speculators_model_type": "mtp"}, "speculators' mtp", ""),
        ({"speculators_model_type": "peagle"}, "speculators' peagle", ""),
        ({"model_type": "gemma4_assistant", "architectures": ["X"]}, "gemma4_assistant", "mtp"),
        ({"model_type": "specdec_ngram_lm"}, "specdec_ngram_lm", "ngram-lm"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM", "causal-lm"),
        ({"architectures": ["Gemma4DSparkModel"], "model_type": "gemma4"}, "Gemma4DSparkModel", ""),
        ({}, "nothing that says what it is", ""),
    ],
)
def test_kinds_of_checkpoints(config: dict[str, Any], called: str, family: str) -> None:
    assert kind_of(config) == (called, family)
    message = why_other(config, "dflash")
    assert message.startswith(f"it holds {called}")
    assert (f"--drafter {family}:MODEL" in message) == bool(family)


@pytest.mark.parametrize("family", ["mtp", "causal-lm"])
def test_families_of_transformers_refuse_other_kinds_as_well(family: str) -> None:
    with pytest.raises(InvalidArgumentError, match="it holds DFlashDraftModel; write --drafter dflash:MODEL"):
        load_drafters(DrafterConfig(drafter=(f"{family}:{FIXTURES / 'dflash-zlab/full'}",)))


def copy_with(variant: str, folder: Path, changes: dict[str, Tensor | None], **config: Any) -> Path:
    """Write a checkpoint with other weights (None: without them) and another config."""
    folder.mkdir()
    written = json.loads((FIXTURES / variant / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    weights = load_file(FIXTURES / variant / "model.safetensors") | changes
    save_file(
        {key: value for key, value in weights.items() if value is not None}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    ("family", "variant", "changes", "config"),
    [
        ("eagle3", "eagle3-speculators/qwen3_norms", {"fc_norm.0.weight": torch.ones(1)}, {}),
        ("eagle3", "eagle3-speculators/llama_two_layers", {"input_norm.weight": torch.ones(3)}, {}),
        ("eagle3", "eagle3-speculators/qwen3_norms", {"embed_tokens.weight": torch.ones(9, 64)}, {}),
        ("eagle3", "eagle3-speculators/llama_d2t", {"lm_head.weight": None}, {}),
        (
            "eagle3",
            "eagle3-speculators/qwen3_norms",
            {},
            {"eagle_aux_hidden_state_layer_ids": [2**40, 1]},
        ),
        ("dflash2", "dflash2/published", {"candidate_selector.successor_codebook": torch.ones(3)}, {}),
        (
            "dflash2",
            "dflash2/published",
            {},
            {"dflash_config": {"target_layer_ids": [0, 2, 4], "mask_token_id": 159, "selector_top_k": 0}},
        ),
        (
            "dflash2",
            "dflash2/published",
            {
                f"candidate_selector.{name}_codebook": torch.ones(9, 16)
                for name in ("successor", "predecessor")
            },
            {},
        ),
        (
            "dflash2",
            "dflash2/published",
            {"candidate_selector.hidden_projection.weight": torch.ones(16, 3)},
            {},
        ),
        ("dspark", "dspark/vanilla", {"markov_head.markov_w1.weight": torch.ones(9, 12)}, {}),
        ("dspark", "dspark/vanilla", {"markov_head.markov_w1.weight": torch.ones(3)}, {}),
        ("dspark", "dspark/gated_d2t", {"markov_head.markov_w2.weight": torch.ones(9, 8)}, {}),
        ("dspark", "dspark/gated_d2t", {"markov_head.gate_proj.bias": torch.ones(3)}, {}),
        ("dspark", "dspark/vanilla", {"confidence_head.proj.bias": torch.ones(3)}, {}),
        ("dspark", "dspark-deepspec/qwen3_vanilla", {}, {"target_layer_ids": [-1, 3]}),
        ("dflash", "dflash-zlab/full", {}, {"hidden_act": "x"}),
        ("dflash", "dflash-zlab/full", {}, {"num_key_value_heads": 0}),
        ("dflash", "dflash-zlab/full", {}, {"default_draft_depth": -1}),
        ("dflash", "dflash-zlab/full", {}, {"vocab_size": -1}),
        ("dflash", "dflash-zlab/full", {}, {"block_size": 10**12}),
    ],
)
def test_checkpoints_that_do_not_fit_together_are_refused(
    family: str, variant: str, changes: dict[str, Tensor | None], config: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_with(variant, tmp_path / "drafter", changes, **config)
    with pytest.raises(InvalidArgumentError, match="drafter"):
        load_drafters(DrafterConfig(drafter=(f"{family}:{folder}",), dtype="float32"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((4, 4), math.nan), "fc.weight has values that are not finite"),
        (torch.ones(4, 4, dtype=torch.int8), "fc.weight is of torch.int8; quantised drafters are not run"),
    ],
)
def test_weights_that_cannot_draft_are_refused(weight: Tensor, message: str, tmp_path: Path) -> None:
    save_file({"fc.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=message):
        read_weights(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("pickled", [[1], {"fc.weight": 3}, {3: torch.ones(2)}, torch.ones(2)])
def test_pickles_of_something_else_are_refused(pickled: Any, tmp_path: Path) -> None:
    torch.save(pickled, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_weights(tmp_path, torch.device("cpu"))


def test_weights_of_the_authors_may_be_pickled(tmp_path: Path) -> None:
    torch.save(load_file(FIXTURES / "eagle3/d2t/model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((FIXTURES / "eagle3/d2t/config.json").read_text())
    loaded = EagleCheckpoint.load(str(tmp_path), dtype="float32", device="cpu", num_target_layers=8)
    assert loaded.settings.layer_ids == (1, 3, 4)


@torch.inference_mode()
def test_an_eagle_round_that_is_asked_for_again_gives_the_same_draft() -> None:
    other, drafter = load_eagle("eagle3/d2t")
    items = list[DraftItem]()
    for length in (20, 9):
        committed = tuple(other.token_ids[: length + 1])
        session = drafter.open(OpenDraft(committed, len(committed), 60))
        session.target_weights, session.view = other.weights, other.view(drafter, length)
        items.append(DraftItem(drafter, session, 4, 1))
    first = drafter.propose(items[:1])
    assert drafter.propose(items)[0] == first[0]
    assert drafter.propose(items[:1]) == first


@torch.inference_mode()
def test_only_the_confidence_keeps_a_tree_of_dspark_short() -> None:
    other = OtherProject("dspark/gated_d2t")
    cases = other.sessions()["long"]
    ((_, chain, _), *_), ((_, tree, _), *_) = (
        list(run(other, load("dspark/gated_d2t", DSPARK)[2], cases[:1], confidence=0.3, num_nodes=nodes))
        for nodes in (0, 60)
    )
    assert isinstance(chain, list)
    assert isinstance(tree, DraftTree)
    assert len(tree) > len(chain) > 1, "a single token, where the probabilities count as well"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 0),
        ({"max_position_embeddings": None}, 0),
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"transformer_layer_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 9}, 4096),
        ({"max_position_embeddings": 1000, "rope_scaling": YARN}, 4000),
        ({"max_position_embeddings": 8000, "rope_parameters": YARN}, 8000),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": YARN}}, 512),
        ({"rope_scaling": YARN}, 0),
    ],
)
def test_a_config_says_how_long_a_text_may_be(config: dict[str, Any], expected: int) -> None:
    assert context_length(config) == expected
