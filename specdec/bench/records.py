"""What a benchmark measures of a request, and the interface through which every engine answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from specdec.bench.workload import Prompt, QuestionId
from specdec.client import MethodRounds, ProposerStats, Speculation

METHOD_SEPARATOR = "@"
"""Between a method and its K, where a run has several."""
NODES_SEPARATOR = "/"
"""Between a method and its node budget, where a run has several."""
MEMORY_MARK = ":memory"
"""After a method whose requests are drafted from the answers to earlier ones as well."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished generation as its engine reports it."""

    token_ids: tuple[int, ...]
    """The emitted tokens, with the end token."""
    input_tokens: int
    """Number of tokens in the prompt, with the chat template."""
    ttft_ms: float
    """Time from the request's arrival at the engine to the first token, milliseconds."""
    tpot_ms: float | None
    """Mean time per output token after the first, milliseconds; None: fewer than two tokens."""
    finish_reason: str
    """Why the answer ended: "stop_token" or "length"."""
    speculation: Speculation | None
    """What the rounds did; None: the engine has none."""
    accepted: tuple[int, ...] = ()
    """Draft tokens that each round accepted; empty: the engine has no rounds."""
    text: str = ""
    """The answer's text; empty where the engine returns token ids alone."""


class Backend(Protocol):
    """An engine set up for one method."""

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt.

        Raises:
            SpecdecError: the request failed, which is recorded; the run goes on.
        """


@dataclass(frozen=True, slots=True)
class Contender:
    """One method of a comparison."""

    method: str
    """The method's name in the results."""
    backend: Backend
    """The engine that answers."""
    is_concurrent: bool = True
    """Whether the engine takes several requests at a time."""
    has_memory: bool = False
    """Whether its requests share what drafters remember of them; otherwise each stands alone."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a run; either `answer` or `error` is set."""

    method: str
    """Method that answered."""
    concurrency: int
    """Number of requests under way at a time."""
    question_id: QuestionId
    """Id of the prompt."""
    category: str
    """Category of the prompt."""
    wall_ms: float
    """Time from sending to the end of the answer at the client, milliseconds."""
    busy_ms: float
    """The request's share of its block's wall time, milliseconds, in proportion to `wall_ms`. The shares of a
    method's requests add up to the time for which it kept the services busy."""
    answer: Answer | None
    """The answer; None: the request failed."""
    error: str = ""
    """Why the request failed."""
    source: str = ""
    """Name of the prompt's file."""
    ask: int = 1
    """Which time the prompt was asked, counted from 1."""
    turn: int = 1
    """Which turn of the user was answered, counted from 1."""
    pair: int = 0
    """Number of its block of prompts, which all methods answer one right after the other."""

    @property
    def prompt_key(self) -> tuple[str, QuestionId, int, int]:
        """What tells the request from all others of its method and concurrency."""
        return self.source, self.question_id, self.ask, self.turn

    def to_json(self) -> dict[str, Any]:
        """Return the record as a flat object: an answer's fields stand beside the request's."""
        fields = asdict(self)
        answer = fields.pop("answer") or {}
        return {**fields, **answer}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RequestRecord:
        """Return the record that such an object holds.

        Raises:
            KeyError, TypeError: it is not such an object.
        """
        own = {field.name: values[field.name] for field in fields(cls) if field.name != "answer"}
        return cls(**own, answer=None if own["error"] else _answer(values))


def _answer(values: Mapping[str, Any]) -> Answer:
    told = {field.name: _frozen(values[field.name]) for field in fields(Answer)}
    if speculation := values["speculation"]:
        parts = {name: _frozen(value) for name, value in speculation.items()}
        parts["proposers"] = tuple(ProposerStats(**each) for each in speculation["proposers"])
        parts["methods"] = tuple(MethodRounds(**each) for each in speculation["methods"])
        told["speculation"] = Speculation(**parts)
    return Answer(**told)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
