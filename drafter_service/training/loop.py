"""The training loop that all methods share: schedule, checkpoints, held-out acceptance, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.checkpoint import read_checkpoint, write_checkpoint
from drafter_service.training.config import LoopConfig
from drafter_service.training.data import Batch, TokenData, TokenSequence, batches, split
from drafter_service.training.features import SequenceFeatures
from drafter_service.training.log import LOG_FILE, TrainingLog
from drafter_service.training.trainee import Trainee
from specdec.contract.errors import InvalidArgumentError

CHECKPOINT = "checkpoint.pt"
Features = Callable[[Sequence[TokenSequence]], list[SequenceFeatures]]
"""Returns the features of sequences: a FeatureSource."""
_PRINT_EVERY_S = 60.0
"""Time between two lines where there is no terminal to draw the bar on."""
_FINAL_RATE = 0.02
"""Share of the learning rate that is left at the end of its cosine."""


@dataclass(slots=True)
class History:
    """What a run has done so far."""

    step: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    """Number of answer tokens trained on; each counts once per pass."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, moving average)"""
    acceptance: list[tuple[int, float]] = field(default_factory=list)
    """(step, acceptance length of held-out answers)"""


class Training:
    """Trains one drafter over data."""

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
        self._printed = -math.inf

    @property
    def draft_depth(self) -> int:
        """K of the held-out acceptance: at most what the drafter can draft."""
        wanted = self.config.draft_depth
        return min(wanted, self.trainee.max_draft_depth or wanted)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        if self.config.steps:
            return min(1.0, self.history.step / self.config.steps)
        return min(1.0, self.history.seconds / (60 * self.config.minutes))

    def run(self) -> HeldOutAcceptance:
        """Train to the end; an interrupted run leaves its checkpoint.

        Returns:
            The held-out acceptance at the end.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        log = TrainingLog(self.config.out / LOG_FILE, self.history.step)
        with log, Progress(*columns, console=self._console) as bar:
            task = bar.add_task("taking the first step", total=1.0)
            bar.update(task, completed=self.progress)
            if self.progress < 1.0:
                self._run(log, lambda text: bar.update(task, completed=self.progress, description=text))
            bar.update(task, description="reading held-out answers")
            acceptance = self.evaluate()
            log.add_acceptance(self.history.step, self.history.num_tokens, acceptance)
            return acceptance

    def _run(self, log: TrainingLog, report: Callable[[str], None]) -> None:
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
                log.add_step(history.step, history.num_tokens, history.seconds, history.losses[-1][1])
                report(self._describe())
                self._print_now_and_then()
                if history.seconds - evaluated >= 60 * config.evaluate_minutes:
                    evaluated = history.seconds
                    self._look(log)
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
            # The checkpoint that is saved next is that of the step before.
            self._generator.set_state(before)
            raise
        self._note(loss, batch.sequences)
        self.history.seconds += time.perf_counter() - started

    def _update(self, features: Sequence[SequenceFeatures]) -> float:
        """Change the weights by a batch and return its loss.

        Raises:
            InvalidArgumentError: loss or gradient is not finite; the weights stay as they were.
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

    def _print_now_and_then(self) -> None:
        """Print a line after the first step and then every minute, where there is no terminal for the bar."""
        if not self._console.is_terminal and time.monotonic() - self._printed >= _PRINT_EVERY_S:
            self._printed = time.monotonic()
            self._console.print(f"{self.progress:.0%}: {self._describe()}")

    def _look(self, log: TrainingLog) -> None:
        acceptance = self.evaluate()
        log.add_acceptance(self.history.step, self.history.num_tokens, acceptance)
        self.history.acceptance.append((self.history.step, acceptance.length))
        self._console.print(f"{self._describe()} (held out, K = {self.draft_depth})")
        self.save_checkpoint()

    def evaluate(self) -> HeldOutAcceptance:
        """Measure acceptance on the held-out answers."""
        if not self._held_out_features:
            self._held_out_features = [self.source(group) for group in self._held_out_groups()]
        self.trainee.eval()
        accepted: list[list[int]] = []
        with torch.autocast(self._device.type, torch.bfloat16):
            for features in self._held_out_features:
                accepted += self.trainee.accepted(features, self.draft_depth)
        return HeldOutAcceptance.of(accepted, self.draft_depth)

    def _held_out_groups(self) -> list[list[TokenSequence]]:
        """Return the held-out sequences, cut as those trained on, in groups as large as a step, which fit
        into memory as a step does."""
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
        """Write all that a resumed run needs."""
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
            InvalidArgumentError: the checkpoint is damaged, or belongs to a run with other settings.
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
                f"{path} belongs to another drafter, or is damaged: {error}", field="resume"
            ) from error

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed: the trainee, the data and their order."""
        settings = ("tokens_per_step", "max_length", "passes", "num_held_out", "seed")
        return {
            **self.trainee.identity(),
            "data": self._data_fingerprint,
            **{name: getattr(self.config, name) for name in settings},
        }


def _num_answer_tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.token_ids) - sequence.prompt_length for sequence in sequences)
