"""Self-generated training data: a causal LM's greedy answers to prompts, many at a time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from drafter_service.training.data import TokenData, TokenSequence
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.runtime.attention import Segment
from specdec.runtime.kv_slots import KvAllocation
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.picks import PickContext, Picker

_MAX_PREFILL_TOKENS = 2048
"""Most prompt tokens that join a pass, to bound its memory and time; a longer prompt joins alone."""
_LOG_EVERY_S = 30.0
"""Time between two lines where there is no terminal to draw a bar on."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """Longest continuation, tokens, at least one."""
    stop_ids: frozenset[int]
    """Tokens that end the continuation; the one that does is its last token."""
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(slots=True)
class _Running:
    """A job in the batch. All its tokens but those of the next segment have KV."""

    index: int
    job: Job
    allocation: KvAllocation
    token_ids: list[int]
    """The prompt and its continuation so far."""

    @property
    def output(self) -> list[int]:
        return self.token_ids[len(self.job.prompt) :]

    @property
    def is_finished(self) -> bool:
        num_output = len(self.token_ids) - len(self.job.prompt)
        stopped = num_output > 0 and self.token_ids[-1] in self.job.stop_ids
        return stopped or num_output >= self.job.max_tokens

    def next_segment(self) -> Segment:
        """Return the job's part of the next pass: the whole prompt at first, then a token a pass."""
        is_first = len(self.token_ids) == len(self.job.prompt)
        num_cached = 0 if is_first else len(self.token_ids) - 1
        return Segment(self.allocation, num_cached, self.token_ids[num_cached:], num_logits=1)


class Decoder:
    """Continues prompts with continuous batching: a finished job's place goes to the next job at once.

    Args:
        batch_size: number of jobs under way at a time, fewer where the KV pool has no room for them.
    """

    def __init__(self, packed: PackedModel, batch_size: int) -> None:
        self.packed = packed
        self._batch_size = batch_size
        self._picker = Picker(packed.vocab_size, packed.device)

    def run(
        self, jobs: Sequence[Job], on_tokens: Callable[[int], None] = lambda num_tokens: None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield each job's index and continuation when it finishes; the order depends only on the jobs.

        Args:
            on_tokens: called after each pass with the number of tokens it brought.

        Raises:
            InvalidArgumentError: a job is longer than the KV pool.
        """
        waiting = deque(enumerate(jobs))
        running: list[_Running] = []
        try:
            while waiting or running:
                self._admit(waiting, running)
                self._step(running)
                on_tokens(len(running))
                finished = [job for job in running if job.is_finished]
                running = [job for job in running if not job.is_finished]
                self._free(finished)
                for job in finished:
                    yield job.index, job.output
        finally:
            self._free(running)

    def _admit(self, waiting: deque[tuple[int, Job]], running: list[_Running]) -> None:
        """Give free places to the next jobs; a job that finds no KV waits for another to finish."""
        pool, num_prefill = self.packed.pool, 0
        while waiting and len(running) < self._batch_size:
            index, job = waiting[0]
            num_tokens = len(job.prompt) + job.max_tokens
            is_crowded = num_prefill > 0 and num_prefill + len(job.prompt) > _MAX_PREFILL_TOKENS
            if is_crowded or (running and num_tokens > pool.free_tokens):
                return
            num_prefill += len(job.prompt)
            running.append(_Running(index, job, pool.allocate(num_tokens), list(job.prompt)))
            waiting.popleft()

    @torch.inference_mode()
    def _step(self, running: Sequence[_Running]) -> None:
        """Run one pass, which brings every job a token."""
        logits = self.packed.forward([part.next_segment() for part in running])
        contexts = [PickContext(part.job.sampling, part.token_ids, len(part.job.prompt)) for part in running]
        for part, picks in zip(running, self._picker.pick(logits, contexts), strict=True):
            part.token_ids.append(picks[0])

    def _free(self, running: Sequence[_Running]) -> None:
        for part in running:
            self.packed.pool.free(part.allocation)


class GenerationProgress:
    """A bar on `console` that shows finished continuations and tokens per second."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> GenerationProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def run(self, what: str, decoder: Decoder, jobs: Sequence[Job]) -> list[list[int]]:
        """Run all jobs, shown as `what`, and return their continuations in the jobs' order."""
        task_id = self._bar.add_task(what, total=len(jobs), rate="")
        task = self._bar.tasks[self._bar.task_ids.index(task_id)]
        num_tokens, said = 0, -math.inf

        def count(new: int) -> None:
            nonlocal num_tokens, said
            num_tokens += new
            rate = f"{num_tokens / max(task.elapsed or 0.0, 1e-9):.0f} tokens/s"
            self._bar.update(task_id, rate=rate)
            if not self._bar.console.is_terminal and time.monotonic() - said > _LOG_EVERY_S:
                said = time.monotonic()
                self._bar.console.print(f"{what}: {task.completed:.0f} of {len(jobs)}, {rate}")

        outputs: list[list[int]] = [[] for _ in jobs]
        for index, output in decoder.run(jobs, count):
            outputs[index] = output
            self._bar.advance(task_id)
        return outputs


def generate(
    packed: PackedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_sequences: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int,
    progress: GenerationProgress,
) -> TokenData:
    """Answer the first `num_sequences` prompts greedily, or all where there are fewer, in their order.

    Args:
        prompts: token ids of each prompt.
        max_new_tokens: longest answer, tokens; shorter where the model's context ends sooner.
        eos_token_ids: tokens that end an answer and belong to it.
        batch_size: number of answers under way at a time.

    Raises:
        InvalidArgumentError: a prompt is empty, or leaves no room for an answer.
    """
    stop_ids = frozenset(eos_token_ids)
    jobs = [
        Job(tuple(prompt), min(max_new_tokens, room_after(packed, prompt)), stop_ids)
        for prompt in islice(prompts, num_sequences)
    ]
    answers = progress.run("Answering", Decoder(packed, batch_size), jobs)
    return TokenData.of(
        [
            TokenSequence((*job.prompt, *answer), len(job.prompt))
            for job, answer in zip(jobs, answers, strict=True)
        ]
    )


def room_after(packed: PackedModel, prompt: Sequence[int]) -> int:
    """Return how many tokens fit after a prompt into the model's context and into the whole KV pool.

    Raises:
        InvalidArgumentError: no token fits, or the prompt is empty.
    """
    capacity = packed.pool.capacity_tokens
    max_length = min(packed.max_length or capacity, capacity)
    if not 0 < len(prompt) < max_length:
        raise InvalidArgumentError(
            f"A prompt has {len(prompt)} tokens; it needs 1 to {max_length - 1} to leave room for an answer.",
            field="prompts",
        )
    return max_length - len(prompt)
