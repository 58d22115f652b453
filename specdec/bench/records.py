"""What a benchmark measures of a request, and the one interface behind which every engine answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from specdec.bench.workload import Prompt
from specdec.client import Speculation

METHOD_SEPARATOR = "@"
"""Between a method and its K, where a run has several."""
NODES_SEPARATOR = "/"
"""Between a method and its node budget, where a run has several."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished generation as its engine reports it."""

    token_ids: tuple[int, ...]
    """The emitted tokens, end token included."""
    input_tokens: int
    """Tokens of the prompt, chat template included."""
    ttft_ms: float
    """Time to the first token, milliseconds, from the request's arrival at the engine."""
    tpot_ms: float | None
    """Mean time per output token after the first, milliseconds; None: fewer than two tokens."""
    finish_reason: str
    """Why it ended, "stop_token" or "length"."""
    speculation: Speculation | None
    """What its rounds did; None: the engine has no rounds."""


class Backend(Protocol):
    """An engine set up for one method."""

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt.

        Raises:
            SpecdecError: the request failed; it is recorded and the run goes on.
        """


@dataclass(frozen=True, slots=True)
class Contender:
    """One method of a comparison."""

    method: str
    """Its name in the results."""
    backend: Backend
    """What answers for it."""
    is_concurrent: bool = True
    """Whether it takes more than one request at a time."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a run; either `answer` or `error` is set."""

    method: str
    """Method that answered."""
    concurrency: int
    """Requests under way at a time."""
    question_id: int
    """The prompt's."""
    category: str
    """The prompt's."""
    wall_ms: float
    """From sending to the end of the answer at the client, milliseconds."""
    busy_ms: float
    """The request's share of its block's wall time, milliseconds, in proportion to `wall_ms`; alone in its
    block, all of it. The shares of a method's requests add up to the time it kept the services busy."""
    answer: Answer | None
    """None: the request failed."""
    error: str = ""
    """Why it failed."""

    def to_json(self) -> dict[str, Any]:
        """The record as one flat object; an answer's fields stand beside the request's."""
        fields = asdict(self)
        answer = fields.pop("answer") or {}
        return {**fields, **answer}
