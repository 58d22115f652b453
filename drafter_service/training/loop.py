"""The training loop every method shares: schedule, checkpoints, held-out acceptance, progress."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from drafter_service.training.checkpoint import read_checkpoint, write_checkpoint
from drafter_service.training.config import LoopConfig
from drafter_service.training.data import Batch, TokenData, TokenSequence, batches, split
from drafter_service.training.features import SequenceFeatures
from specdec.contract.errors import InvalidArgumentError

CHECKPOINT = "checkpoint.pt"
Features = Callable[[Sequence[TokenSequence]], list[SequenceFeatures]]
"""Where the features of sequences come from: a FeatureSource."""
_LOG_EVERY = 25
_LOG_EVERY_S = 60.0
_FINAL_RATE = 0.02
"""Of the learning rate, at the end of its cosine."""


@dataclass(slots=True)
class History:
    """What a run has come through."""

    step: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    """Answer tokens trained on; each counts once per pass."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, moving average)"""
    acceptance: list[tuple[int, float]] = field(default_factory=list)
    """(step, acceptance length of held-out answers)"""


class Trainee(nn.Module, ABC):
    """A drafter being trained. Its parameters are what is trained."""

    @property
    def max_draft_depth(self) -> int | None:
        """Tokens it can draft in a round; None: any number."""
        return None

    @abstractmethod
    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """The loss of a batch, a scalar."""

    @abstractmethod
    def accepted(self, features: Sequence[SequenceFeatures], draft_depth: int) -> list[list[int]]:
        """Per sequence, for each answer token but the last as anchor, how many drafts would be accepted."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it is besides its weights, by name, in plain values: a run goes on with the same only."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the drafter's checkpoint, without card."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Start from a drafter that was saved.

        Raises:
            InvalidArgumentError: it is of another shape.
        """


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Greedy acceptance over answers, round by round as they would be generated."""

    num_answers: int
    num_rounds: int
    num_accepted: int
    per_position: tuple[float, ...]
    """Of the rounds, the share in which the draft's first, second... token was accepted."""

    @property
    def draft_depth(self) -> int:
        """K of the rounds."""
        return len(self.per_position)

    @property
    def length(self) -> float:
        """Tokens a round emits, the target's own included."""
        return 1.0 + self.num_accepted / max(self.num_rounds, 1)

    @classmethod
    def of(cls, accepted: Sequence[Sequence[int]], draft_depth: int) -> Acceptance:
        """Walk the anchors of each answer: a round ends `accepted` + 1 tokens on."""
        rounds = [count for counts in accepted for count in _walk(counts)]
        shares = [
            sum(count > index for count in rounds) / max(len(rounds), 1) for index in range(draft_depth)
        ]
        return cls(len(accepted), len(rounds), sum(rounds), tuple(shares))


def _walk(counts: Sequence[int]) -> list[int]:
    rounds, anchor = [], 0
    while anchor < len(counts):
        rounds.append(counts[anchor])
        anchor += counts[anchor] + 1
    return rounds


class Training:
    """One run of a trainee over data."""

    def __init__(
        self, trainee: Trainee, source: Features, data: TokenData, config: LoopConfig, console: Console
    ) -> None:
        self.trainee, self.config = trainee, config
        self.history = History()
        self.source, self._data, self._console = source, data, console
        self._data_fingerprint = data.fingerprint
        self._train, self._held_out = split(data, config.num_held_out)
        self._parameters = list(trainee.parameters())
        self._device = self._parameters[0].device
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._generator = torch.Generator().manual_seed(config.seed)
        self._held_out_features: list[list[SequenceFeatures]] = []
        self._kept_features: dict[int, list[SequenceFeatures]] = {}
        self._logged = time.monotonic()

    @property
    def draft_depth(self) -> int:
        """K of the held-out acceptance: no more than the drafter can make."""
        wanted = self.config.draft_depth
        return min(wanted, self.trainee.max_draft_depth or wanted)

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.config.steps:
            return min(1.0, self.history.step / self.config.steps)
        return min(1.0, self.history.seconds / (60 * self.config.minutes))

    def run(self) -> Acceptance:
        """Train to the end; an interrupted run leaves its checkpoint.

        Returns:
            The held-out acceptance at the end.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("reading held-out answers", total=1.0)
            bar.update(task, completed=self.progress)
            if self.progress < 1.0:
                self._run(lambda text: bar.update(task, completed=self.progress, description=text))
            return self.evaluate()

    def _run(self, report: Callable[[str], None]) -> None:
        history, config = self.history, self.config
        evaluated = history.seconds
        stream = batches(
            self._data,
            self._train,
            tokens_per_step=config.tokens_per_step,
            max_length=config.max_length,
            passes=config.passes,
            seed=config.seed,
            skip=history.step,
        )
        try:
            for batch in stream:
                self._step(batch)
                if history.step % _LOG_EVERY == 0:
                    report(self._describe())
                    self._log()
                if history.seconds - evaluated >= 60 * config.evaluate_minutes:
                    evaluated = history.seconds
                    self._look()
                if self.progress >= 1.0:
                    break
        finally:
            self.save_checkpoint()

    def _features(self, batch: Batch) -> list[SequenceFeatures]:
        features = self._kept_features.pop(batch.number, None) or self.source(batch.sequences)
        if not batch.is_last_pass:
            self._kept_features[batch.number] = features
        return features

    def _step(self, batch: Batch) -> None:
        started = time.perf_counter()
        features = self._features(batch)
        before = self._generator.get_state()
        try:
            loss = self._update(features)
        except BaseException:
            # The checkpoint that is saved now is that of the step before.
            self._generator.set_state(before)
            raise
        self._note(loss, batch.sequences)
        self.history.seconds += time.perf_counter() - started

    def _update(self, features: Sequence[SequenceFeatures]) -> float:
        """Change the weights by a batch; its loss.

        Raises:
            InvalidArgumentError: loss or gradient is not finite; the weights are as they were.
        """
        self.trainee.train()
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = self.trainee.loss(features, self._generator)
        self._require_finite("loss", loss)
        self._optimizer.zero_grad()
        loss.backward()
        self._require_finite("gradient", nn.utils.clip_grad_norm_(self._parameters, 1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        return loss.item()

    def _require_finite(self, name: str, value: Tensor) -> None:
        if not math.isfinite(value.item()):
            raise InvalidArgumentError(
                f"The {name} is {value.item()} at step {self.history.step}: lower --learning-rate, and go on "
                "with --resume.",
                field="learning_rate",
            )

    def _note(self, loss: float, batch: Sequence[TokenSequence]) -> None:
        history = self.history
        average = history.losses[-1][1] if history.losses else loss
        history.step += 1
        history.num_tokens += _num_answer_tokens(batch)
        history.losses.append((history.step, 0.98 * average + 0.02 * loss))

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.history.step + 1) / self.config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.config.learning_rate * warm * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _describe(self) -> str:
        history = self.history
        rate = history.num_tokens / history.seconds
        length = f", acceptance {history.acceptance[-1][1]:.2f}" if history.acceptance else ""
        return f"step {history.step}, loss {history.losses[-1][1]:.3f}, {rate:.0f} tokens/s{length}"

    def _log(self) -> None:
        """A line a minute where there is no terminal to draw the bar on."""
        if not self._console.is_terminal and time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            self._console.print(f"{self.progress:.0%}: {self._describe()}")

    def _look(self) -> None:
        acceptance = self.evaluate()
        self.history.acceptance.append((self.history.step, acceptance.length))
        self._console.print(f"{self._describe()} (held out, K = {self.draft_depth})")
        self.save_checkpoint()

    def evaluate(self) -> Acceptance:
        """Acceptance on the held-out answers."""
        if not self._held_out_features:
            self._held_out_features = [self.source(group) for group in self._held_out_groups()]
        self.trainee.eval()
        accepted: list[list[int]] = []
        with torch.autocast(self._device.type, torch.bfloat16):
            for features in self._held_out_features:
                accepted += self.trainee.accepted(features, self.draft_depth)
        return Acceptance.of(accepted, self.draft_depth)

    def _held_out_groups(self) -> list[list[TokenSequence]]:
        """Held-out sequences, cut as those trained on, in groups as large as a step: what a step has memory
        for, an evaluation has."""
        groups: list[list[TokenSequence]] = []
        for whole in map(self._data.__getitem__, self._held_out):
            sequence = TokenSequence(whole.token_ids[: self.config.max_length], whole.prompt_length)
            if _num_answer_tokens([sequence]) <= 2:
                continue
            if not groups or _num_answer_tokens(groups[-1]) >= self.config.tokens_per_step:
                groups.append([])
            groups[-1].append(sequence)
        return groups

    def save_checkpoint(self) -> None:
        """Write everything a resumed run needs."""
        state = {
            "identity": self._identity(),
            "trainee": self.trainee.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "history": asdict(self.history),
        }
        write_checkpoint(self.config.out / CHECKPOINT, state)

    def resume(self) -> None:
        """Go on from the checkpoint in the output folder.

        Raises:
            InvalidArgumentError: it is damaged, or of a run with other settings.
        """
        path = self.config.out / CHECKPOINT
        state = read_checkpoint(path, self._identity())
        try:
            self.trainee.load_state_dict(state["trainee"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._generator.set_state(state["generator"])
            self.history = History(**state["history"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgumentError(
                f"{path} is of another drafter, or damaged: {error}", field="resume"
            ) from error

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed: the trainee, its data and their order."""
        settings = ("tokens_per_step", "max_length", "passes", "num_held_out", "seed")
        return {
            **self.trainee.identity(),
            "data": self._data_fingerprint,
            **{name: getattr(self.config, name) for name in settings},
        }


def _num_answer_tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.token_ids) - sequence.prompt_length for sequence in sequences)
