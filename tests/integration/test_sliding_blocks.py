"""Layers with a sliding window give back what no query sees: others have the room, and no answer changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from drafter_service.training.generate import Decoder, Job
from specdec.client import GenerateOptions
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import FailedPreconditionError
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import TargetStateSpec, WindowBlocks
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.loading import load_causal_lm
from specdec.runtime.packed_model import PackedModel
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import eventually
from tests.integration.test_mtp import ByHand, Recorder
from tests.integration.test_preemption import run
from tests.integration.test_waiting import nothing_is_held
from tests.raw_streams import draft_stream, until, verify_stream
from tests.slow import quick_only
from tests.state_probe import StateProbe, assert_same, read_all, ref_of, state_reader, state_session
from tests.systems import running_drafter, running_system, running_verifier
from tests.tiny_assistants import save_narrow_pair
from tests.tiny_models import save_tiny_model
from tests.trees import random_tree
from tests.unit.test_stats import points
from verifier_service.verifier import Verifier

CHUNK = 32
LENGTH = 7 * BLOCK_TOKENS
"""Tokens of a text at its end, prompt included."""
KIND_MIB = 2**-6
"""KV of a block of the tiny Gemma 4, in the two layers with a window of 16 or in the two without."""
MOST_BLOCKS = 3
"""What a session holds of the layers with a window between its passes: 17 positions that are seen, up to 63
that a text which goes on from here would see, and those of a round, whatever the text's length."""
PROMPTS = [[5 + number, 6, 7] for number in range(4)]
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, seed=4)
SMALL = {"prefill_chunk_tokens": CHUNK, "kv_session_tokens": LENGTH}
KV_SPEC = TargetStateSpec((1,), True, kv_last_of_each_attention_type=True)


def without_giving_back(
    model: Path,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams = GREEDY,
    *,
    length: int = LENGTH,
    dtype: str = "float32",
) -> list[list[int]]:
    """Return the texts that a pool gives whose sessions keep all that they computed."""
    packed = PackedModel(load_causal_lm(str(model), dtype=dtype, device="cpu").model, kv_budget_bytes=2**24)
    assert packed.pool.sliding is None
    jobs = [Job(tuple(prompt), length - len(prompt), frozenset(), sampling) for prompt in prompts]
    answers = dict(Decoder(packed, len(jobs)).run(jobs))
    return [[*prompt, *answers[index]] for index, prompt in enumerate(prompts)]


def num_held(verifier: Verifier) -> dict[str, int]:
    """Return how many blocks sessions hold of each kind of layers."""
    return {name: group.num_blocks - group.num_available for name, group in verifier.pool.groups.items()}


def sizes(verifier: Verifier) -> tuple[int, int]:
    """Return how many blocks the pool has for layers without a window, and for those with one."""
    assert verifier.pool.sliding
    return verifier.pool.full.num_blocks, verifier.pool.sliding.num_blocks


@pytest.mark.parametrize("with_trees", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", quick_only(["gemma4", "gemma4-shared-kv", "gemma3", "gemma4-moe"], ["gemma4"])
)
async def test_a_long_answer_holds_the_blocks_of_its_window(
    family: str, dtype: str, with_trees: bool, tmp_path: Path
) -> None:
    model, random = save_tiny_model(tmp_path / "model", family), Random(3)
    (expected,) = without_giving_back(model, PROMPTS[:1], dtype=dtype)
    async with running_verifier(model, dtype=dtype, **SMALL) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        async with verify_stream(address) as stream:
            await stream.open(PROMPTS[0], max_new_tokens=LENGTH - 3, ignore_eos=True)
            held = [num_held(verifier)]
            while len(stream.token_ids) < LENGTH:
                right = expected[len(stream.token_ids) :][: random.randint(0, 5)]
                tree = DraftTree.of(right)
                if with_trees:
                    tree = random_tree(random, right, num_wrong=12, vocab_size=256)
                await stream.round(tree.token_ids, parents=tree.parent_indices)
                held.append(num_held(verifier))
            assert stream.token_ids == expected
        assert max(blocks["sliding"] for blocks in held) == MOST_BLOCKS
        assert held[-1]["full"] == LENGTH // BLOCK_TOKENS
        await until(lambda: num_held(verifier) == {"full": 0, "sliding": 0})


async def test_a_pool_too_small_for_two_texts_whole_holds_two(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "gemma4")
    expected = without_giving_back(model, PROMPTS[:2])
    budget = 23 * KIND_MIB
    assert budget // (2 * KIND_MIB) * BLOCK_TOKENS < 2 * LENGTH, "layers with a window would take as much"
    async with running_verifier(model, kv_cache_mib=budget, **SMALL) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        assert sizes(verifier) == (17, 6)
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(verify_stream(address)) for _ in range(2)]
            for stream, prompt in zip(streams, PROMPTS, strict=False):
                await stream.open(prompt, max_new_tokens=LENGTH - 3, ignore_eos=True)
            while len(streams[0].token_ids) < LENGTH:
                for stream in streams:
                    await stream.round()
            assert [stream.token_ids for stream in streams] == expected
            assert num_held(verifier)["full"] == 14
        await until(lambda: num_held(verifier) == {"full": 0, "sliding": 0})


async def test_a_long_prompt_passes_through_a_few_blocks(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "gemma4")
    prompt = [Random(1).randrange(250) for _ in range(LENGTH - 20)]
    (expected,) = without_giving_back(model, [prompt])
    async with running_verifier(model, kv_cache_mib=15 * KIND_MIB, **SMALL) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        assert sizes(verifier) == (10, 5)
        tokens = [await run(address, prompt, LENGTH) for _ in range(2)]
        assert tokens == [(expected, 0)] * 2
        # Two at once: each in its turn has room for what it reads.
        tokens = await asyncio.gather(*(run(address, prompt, LENGTH) for _ in range(2)))
        assert [text for text, _ in tokens] == [expected] * 2
        await until(lambda: num_held(verifier) == {"full": 0, "sliding": 0})


@pytest.mark.parametrize("sampling", quick_only([GREEDY, SAMPLED], [SAMPLED]))
@pytest.mark.parametrize(
    ("method", "storage", "draft_nodes"),
    quick_only(
        [
            ("none", "auto", 0),
            ("ngram", "auto", 0),
            ("mtp", "handle", 0),
            ("mtp", "stream", 0),
            ("mtp", "handle", 12),
            ("mtp+ngram", "stream", 12),
        ],
        [("mtp", "handle", 12)],
    ),
)
async def test_every_method_gives_the_text_of_a_pool_that_keeps_all(
    method: str, storage: str, draft_nodes: int, sampling: SamplingParams, tmp_path: Path
) -> None:
    """With too little room for all requests, and then with prompts that were seen before."""
    target, assistant = save_narrow_pair(tmp_path, "gemma4")
    prompts = [[70 + number, *[9, 65, 66, 67, 10, 68, 65, 66] * 19] for number in range(3)]
    length = 5 * BLOCK_TOKENS
    expected = without_giving_back(target, prompts, sampling, length=length)
    metrics = InMemoryMetricReader()
    options = GenerateOptions(
        method=method, sampling=sampling, draft_depth=3, draft_nodes=draft_nodes, ignore_eos=True
    )
    if method == "none":
        options = replace(options, draft_depth=None)
    async with running_system(
        target,
        "ngram",
        f"mtp:{assistant}",
        telemetry=make_telemetry("test", metric_reader=metrics),
        verifier_options={
            "kv_cache_mib": 18 * KIND_MIB,
            "prefill_chunk_tokens": CHUNK,
            "kv_session_tokens": 3 * BLOCK_TOKENS,
            "shared_dir": str(tmp_path),
        },
        drafter_options={"target": str(target), "target_state": storage, "shared_dir": str(tmp_path)},
    ) as system:
        assert system.verifier.servicer.verifier
        assert sizes(system.verifier.servicer.verifier) == (9, 9)
        options = replace(options, max_new_tokens=length - len(prompts[0]))
        found = await asyncio.gather(*(system.client.generate(prompt, options) for prompt in prompts))
        texts = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, found, strict=True)]
        assert texts == expected
        assert sum(point.value for point in points(metrics, "specdec.preemptions")) > 0
        num_accepted = sum(answer.speculation.num_accepted_tokens for answer in found)
        assert (num_accepted > 0) is (method != "none")
        await system.client.generate(prompts[0], options)
        again = await system.client.generate(prompts[0], options)
        assert again.usage.reused_input_tokens == 2 * BLOCK_TOKENS
        assert [*prompts[0], *again.token_ids] == expected[0]
        await eventually(lambda: nothing_is_held(system))


@pytest.mark.parametrize("storage", ["handle", "stream"])
async def test_drafts_past_the_window_are_those_of_transformers(storage: str, tmp_path: Path) -> None:
    target, assistant = save_narrow_pair(tmp_path, "gemma4")
    recorder, reference = Recorder(), ByHand(target, assistant)
    async with running_system(
        target,
        f"mtp:{assistant}",
        families=recorder.families,
        verifier_options={"shared_dir": str(tmp_path), **SMALL},
        drafter_options={"target": str(target), "target_state": storage, "shared_dir": str(tmp_path)},
    ) as system:
        options = GenerateOptions(method="mtp", draft_depth=3, max_new_tokens=LENGTH - 3, ignore_eos=True)
        answer = await system.client.generate(PROMPTS[0], options)
        assert not answer.speculation.num_fallback_rounds
    late = [record for record in recorder.records if len(record.committed) > 4 * BLOCK_TOKENS][::7]
    assert len(late) > 5
    for record in late:
        assert record.draft == reference.draft(record.committed, len(record.draft))


async def test_who_joins_late_reads_the_window_and_who_is_late_is_told(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "gemma4")
    async with (
        running_verifier(model, shared_dir=str(tmp_path), no_prefix_reuse=True, **SMALL) as (address, _),
        state_session(address, PROMPTS[0], KV_SPEC, max_new_tokens=LENGTH - 3) as (stream, opened),
        state_reader("handle", tmp_path) as by_handle,
        state_reader("stream", tmp_path) as by_stream,
    ):
        assert opened.window
        assert opened.window.num_gone_blocks == 0
        blocks, ref = opened.block_ids, opened
        early = by_handle.open(KV_SPEC, LENGTH)
        seen = read_all(await early.view(opened))
        assert not seen.first, "all of a short text is there"
        assert not early.is_behind
        while len(stream.token_ids) < LENGTH - 60:
            ref = ref_of(await stream.round())
            blocks = (*blocks, *ref.block_ids)
        early.check()
        assert early.is_behind, "the first blocks went back to the pool, and nothing is kept"
        assert ref.window
        assert ref.window.num_gone_blocks > 3
        assert len(ref.window.block_ids) <= MOST_BLOCKS
        # Whoever comes now is told of all blocks.
        whole = replace(
            opened, cached_length=ref.cached_length, block_ids=blocks, num_known_blocks=0, window=ref.window
        )
        late = [reader.open(KV_SPEC, LENGTH) for reader in (by_handle, by_stream)]
        readings = [read_all(await session.view(whole)) for session in late]
        assert_same(*readings)
        assert set(readings[0].first.values()) == {ref.cached_length - 17}
        assert not any(session.is_behind for session in late)
        # An old handle shows what is gone: that is said, whichever way it is read.
        for reader in (by_handle, by_stream):
            session = reader.open(KV_SPEC, LENGTH)
            old = replace(whole, cached_length=opened.cached_length + 40, window=opened.window)
            await session.view(old)
            assert session.is_behind
            await session.close()
        for session in (early, *late):
            await session.close()


async def test_a_draft_whose_window_went_to_others_meanwhile_is_dropped(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "gemma4")
    goes_on = threading.Event()
    probe = StateProbe(KV_SPEC, after_reading=lambda session: goes_on.wait(30) and None, expected=[65] * 999)
    options = {"shared_dir": str(tmp_path)}
    async with (
        running_verifier(model, no_prefix_reuse=True, **options, **SMALL) as (address, server),
        running_drafter("probe", families=probe.families, **options) as (drafter_at, drafter),
        state_session(address, PROMPTS[0], KV_SPEC, max_new_tokens=LENGTH - 3) as (stream, ref),
        draft_stream(drafter_at) as draft,
    ):
        await draft.open("probe", PROMPTS[0], max_length=LENGTH)
        drafting = asyncio.ensure_future(draft.round(stream.token_ids[3:], 4, target_state=ref.to_proto()))
        await until(lambda: bool(probe.sessions and probe.sessions[0].readings))
        committed, blocks = list(stream.token_ids), ref.block_ids
        while len(stream.token_ids) < 4 * BLOCK_TOKENS:
            ref = ref_of(await stream.round())
            blocks = (*blocks, *ref.block_ids)
        goes_on.set()
        assert await drafting == [], "what it read may be another's by now"
        # The session goes on: the next draft is one.
        known = probe.sessions[0]
        assert len(committed) == len(known.token_ids)
        ref = replace(ref, block_ids=blocks[1:], num_known_blocks=1)
        new = stream.token_ids[len(committed) :]
        assert await draft.round(new, len(stream.token_ids), target_state=ref.to_proto())
        assert server.servicer.verifier
        assert drafter.servicer.host


FORGED = {
    "no blocks": lambda window: replace(window, block_ids=(), generations=()),
    "blocks past the pool": lambda window: replace(window, block_ids=(2**32 - 1,)),
    "generations past their end": lambda window: replace(window, first_generation=2**32 - 1),
    "a generation too few": lambda window: replace(window, generations=()),
    "many blocks that are gone": lambda window: replace(window, num_gone_blocks=2**32 - 1),
    "more blocks than the session has": lambda window: replace(
        window, block_ids=window.block_ids * 1000, generations=window.generations * 1000
    ),
    "positions before the first block": lambda window: replace(window, num_gone_blocks=1),
}


@pytest.mark.parametrize("name", FORGED)
async def test_a_window_that_cannot_be_is_not_mapped(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "gemma4")
    async with (
        running_verifier(model, shared_dir=str(tmp_path), **SMALL) as (address, _),
        state_session(address, PROMPTS[0], KV_SPEC) as (stream, ref),
        state_reader("handle", tmp_path) as strict,
        state_reader("auto", tmp_path) as lenient,
    ):
        assert ref.window
        window: WindowBlocks = FORGED[name](ref.window)
        forged = replace(ref, window=window)
        with pytest.raises(FailedPreconditionError, match="of a window that the pool lacks"):
            await strict.open(KV_SPEC, LENGTH).view(forged)
        # Who may streams instead.
        expected, session = strict.open(KV_SPEC, LENGTH), lenient.open(KV_SPEC, LENGTH)
        assert_same(read_all(await session.view(forged)), read_all(await expected.view(ref)))
        # Of a session that is mapped, the round is refused.
        later = ref_of(await stream.round())
        with pytest.raises(FailedPreconditionError, match="of a window that the pool lacks"):
            await expected.view(replace(later, window=window))
        await session.close()
        await expected.close()
