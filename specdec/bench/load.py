"""Offered load: requests that come whether or not those before them have ended, and what becomes of each."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import cycle
from pathlib import Path
from typing import Self

from specdec.bench.workload import DEFAULT_PROMPTS, Prompt, load_prompts, select_round_robin
from specdec.client import AsyncClient, GenerateOptions, Message
from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
)
from specdec.contract.sampling import SamplingParams

_CALLS_PER_CONNECTION = 100
_LONG_S = 3600.0
_PAUSE_S = 0.5
"""How long a worker pauses whose request was not answered, seconds."""
"""Most calls of a caller on one connection. A gateway lets a connection have a few more; calls beyond that
would wait at the client, where nobody sees them."""


class Fate(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """The gateway had no room for it: RESOURCE_EXHAUSTED."""
    LATE = "late"
    """Its deadline passed: DEADLINE_EXCEEDED."""
    FAILED = "failed"
    """It ended with another error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What load is offered; `validate` refuses what cannot be offered."""

    prompts_paths: tuple[Path, ...] = (DEFAULT_PROMPTS,)
    """Files of the workload in Spec-Bench's JSONL form; the first turn of each prompt is asked."""
    limit: int | None = None
    """Number of prompts to use, round-robin over the categories; None: all."""
    method: str = "auto"
    """Method that all requests ask for."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 0.0
    """Softmax temperature, >= 0; 0 is greedy."""
    seed: int = 0
    """Seed of the arrivals and of the sampling noise."""
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Offered load as multiples of the capacity, which is measured first."""
    rates: tuple[float, ...] = ()
    """Offered load, requests per second, in place of multiples; the capacity is not measured."""
    concurrency: int = 16
    """Requests under way at a time while the capacity is measured."""
    num_callers: int = 4
    """Number of callers, where they are not given by tokens."""
    heavy_share: float = 0.7
    """Share of all requests that the first caller makes, 0 to 1; the others share the rest evenly."""
    bound_s: float = 20.0
    """Deadline of each request, seconds: an answer that comes later is worth nothing."""
    duration_s: float = 60.0
    """How long each load is measured, seconds, after a time of bound_s in which it only fills the system."""

    @property
    def options(self) -> GenerateOptions:
        """What each request asks for."""
        return GenerateOptions(
            method=self.method,
            max_new_tokens=self.max_new_tokens,
            sampling=SamplingParams(temperature=self.temperature, seed=self.seed),
        )

    def load_prompts(self) -> list[Prompt]:
        """Load the prompts of the run, in its order.

        Raises:
            InvalidArgumentError: the workload is malformed.
        """
        return select_round_robin(load_prompts(*self.prompts_paths), self.limit)

    def validate(self) -> None:
        """Refuse what cannot be offered.

        Raises:
            InvalidArgumentError: naming the value and what it must be.
        """
        self.options.sampling.validate()
        if not self.rates and not self.multiples:
            raise InvalidArgumentError("Give at least one rate or multiple, such as 0.5,1,2,4.")
        if min(self.rates or self.multiples) <= 0:
            raise InvalidArgumentError("Rates and multiples must be more than 0, such as 0.5,1,2,4.")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is to come."""

    at_s: float
    """When, in seconds after the load began."""
    caller: str
    """Who makes it."""
    prompt: Prompt
    """What is asked."""


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One request and what became of it. Times are seconds."""

    offered_per_s: float
    """Requests per second that were offered; 0: the capacity was measured."""
    caller: str
    """Who made it."""
    begun_s: float
    """When it was sent, after the load began."""
    ended_s: float
    """When it ended, after the load began."""
    fate: Fate
    """What became of it."""
    num_tokens: int
    """Tokens that came, of an answer that was not complete as well."""
    waited_s: float
    """How long it waited for its turn, as the gateway says; where it got no answer, how long it was without a
    token."""
    ttft_s: float | None
    """Time to its first token; None: none came."""
    has_retry_info: bool
    """Whether its refusal says when to try again."""
    error: str
    """Why it was not answered."""

    @property
    def total_s(self) -> float:
        """Time from sending to the end."""
        return self.ended_s - self.begun_s


def arrivals(
    config: LoadConfig, rate_per_s: float, callers: Sequence[str], prompts: Sequence[Prompt]
) -> list[Arrival]:
    """Return the requests of a load in the order they come: a Poisson process, the same for the same seed."""
    draw = random.Random(f"{config.seed} {rate_per_s}")
    weights = _weights(len(callers), config.heavy_share)
    made: list[Arrival] = []
    at_s = draw.expovariate(rate_per_s)
    for prompt in cycle(prompts):
        # The load goes on until those that count have ended: they would be answered sooner without it.
        if at_s >= 2 * config.bound_s + config.duration_s:
            break
        made.append(Arrival(at_s, draw.choices(callers, weights)[0], prompt))
        at_s += draw.expovariate(rate_per_s)
    return made


def _weights(num_callers: int, heavy_share: float) -> list[float]:
    """Return each caller's share of the load."""
    if num_callers == 1:
        return [1.0]
    return [heavy_share, *[(1 - heavy_share) / (num_callers - 1)] * (num_callers - 1)]


class LoadCaller:
    """A caller with as many connections as its calls need. Use as `async with`.

    Args:
        gateway: address of the gateway.
        token: bearer token of the caller; empty: the gateway does not tell callers apart.
    """

    def __init__(self, name: str, gateway: str, token: str = "") -> None:
        self.name = name
        self._gateway, self._token = gateway, token
        self._num_calls: dict[AsyncClient, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._num_calls:
            await client.close()

    async def ask(
        self, prompt: Prompt, options: GenerateOptions, *, bound_s: float, load_began: float, rate: float
    ) -> LoadRecord:
        """Make a request and return what became of it.

        Args:
            bound_s: its deadline.
            load_began: when the load began, by time.perf_counter.
            rate: the offered load, requests per second.
        """
        salted = replace(options, cache_salt=uuid.uuid4().hex)
        begun = time.perf_counter()
        first: float | None = None
        num_tokens, waited_s = 0, None
        failure: SpecdecError | None = None
        with self._client() as client:
            try:
                messages = [Message("user", prompt.text)]
                async with client.stream(messages, salted, timeout_s=bound_s) as stream:
                    async for _ in stream:
                        first = first or time.perf_counter()
                        num_tokens += 1
                    waited_s = stream.result.timing.waiting_ms / 1e3
            except SpecdecError as error:
                failure = error
        ended = time.perf_counter()
        return LoadRecord(
            offered_per_s=rate,
            caller=self.name,
            begun_s=begun - load_began,
            ended_s=ended - load_began,
            fate=_fate(failure),
            num_tokens=num_tokens,
            waited_s=(first or ended) - begun if waited_s is None else waited_s,
            ttft_s=first - begun if first else None,
            has_retry_info=failure is not None and failure.retry_after_s is not None,
            error=f"{type(failure).__name__}: {failure.message}" if failure else "",
        )

    @contextmanager
    def _client(self) -> Iterator[AsyncClient]:
        """Yield a client whose connection has room for the call of the block."""
        free = (client for client, number in self._num_calls.items() if number < _CALLS_PER_CONNECTION)
        client = next(free, None) or AsyncClient(self._gateway, token=self._token)
        self._num_calls[client] = self._num_calls.get(client, 0) + 1
        try:
            yield client
        finally:
            self._num_calls[client] -= 1


def _fate(failure: SpecdecError | None) -> Fate:
    match failure:
        case None:
            return Fate.ANSWERED
        case ResourceExhaustedError():
            return Fate.REFUSED
        case DeadlineExceededError():
            return Fate.LATE
    return Fate.FAILED


async def offer(
    config: LoadConfig,
    rate_per_s: float,
    callers: Sequence[LoadCaller],
    prompts: Sequence[Prompt],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LoadRecord]:
    """Let requests come at a rate, and return what became of each, in the order they came.

    Args:
        on_progress: called with the number of requests that have ended and of all requests.
    """
    by_name = {caller.name: caller for caller in callers}
    coming = arrivals(config, rate_per_s, list(by_name), prompts)
    began = time.perf_counter()
    num_ended = 0

    async def ask(arrival: Arrival) -> LoadRecord:
        nonlocal num_ended
        record = await by_name[arrival.caller].ask(
            arrival.prompt, config.options, bound_s=config.bound_s, load_began=began, rate=rate_per_s
        )
        num_ended += 1
        on_progress(num_ended, len(coming))
        return record

    asked: list[asyncio.Task[LoadRecord]] = []
    async with asyncio.TaskGroup() as group:
        for arrival in coming:
            await asyncio.sleep(max(0.0, began + arrival.at_s - time.perf_counter()))
            asked.append(group.create_task(ask(arrival)))
    return [task.result() for task in asked]


async def saturate(
    config: LoadConfig,
    callers: Sequence[LoadCaller],
    prompts: Sequence[Prompt],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LoadRecord]:
    """Keep `config.concurrency` requests under way for as long as a load takes; return all that ended.

    Args:
        on_progress: called with the number of seconds that have passed and of all seconds.

    Raises:
        UnavailableError: none was answered.
    """
    records: list[LoadRecord] = []
    began = time.perf_counter()
    length_s = config.bound_s + config.duration_s
    work = zip(cycle(callers), cycle(prompts), strict=False)

    async def keep_asking() -> None:
        while time.perf_counter() - began < length_s:
            caller, prompt = next(work)
            # Without a deadline of note, lest the gateway begins fewer than it could.
            record = await caller.ask(prompt, config.options, bound_s=_LONG_S, load_began=began, rate=0.0)
            records.append(record)
            if record.fate is not Fate.ANSWERED:
                await asyncio.sleep(_PAUSE_S)
            on_progress(min(int(time.perf_counter() - began), int(length_s)), int(length_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(config.concurrency):
            group.create_task(keep_asking())
    if not any(record.fate is Fate.ANSWERED for record in records if record.ended_s >= config.bound_s):
        raise UnavailableError(f"None of {len(records)} requests was answered; the first: {records[0].error}")
    return records
