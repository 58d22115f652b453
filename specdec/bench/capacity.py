"""What a system of so many verifiers and drafters would give: a simulation of its rounds on measured costs.

Rounds take what a trace says of them where one request runs alone: a draft, a verify pass, and the way
between the services. What several requests cost each other is simulated: they share passes as the verifier's
own scheduler has it, and processors, links and gateways share their time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles

from specdec.bench.simulation import Clock, Engine, Job, Processor, Task, Wait

APART = "apart"
"""Each verifier and each drafter has a processor of its own."""
SHARED = "shared"
"""Drafters compute on the verifiers' processors, in turn: what computes at the same time takes turns."""
TOGETHER = "together"
"""Each verifier has a processor of its own, and all drafters share another one."""
PLACEMENTS = (APART, SHARED, TOGETHER)

_PREFILL_CHUNK_TOKENS = 128
"""What a verifier takes of a prompt in one step."""
_BITS_PER_MS = 1e3
"""Bits that a link of 1 Mbit/s carries in a millisecond."""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What an answer asks of the system."""

    prompt_tokens: int
    """Length of its prompt, tokens."""
    accepted: tuple[int, ...]
    """Draft tokens that each of its rounds accepts."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: the first one, and what the rounds bring."""
        return 1 + len(self.accepted) + sum(self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCosts:
    """What rounds of a method with drafts of one size take where nothing else runs; times in milliseconds."""

    name: str
    """The method and its size, as METHOD/NODES@K."""
    pass_ms: Callable[[float], float]
    """Time of a verify pass, by its tokens: those of all sessions in it, each with an anchor."""
    draft_ms: float = 0.0
    """Time of a draft for one session."""
    draft_growth: float = 1.4
    """By what a draft takes longer where twice as many sessions draft in one step."""
    num_draft_tokens: float = 0.0
    """Mean number of tokens of a draft; 0: plain decoding."""
    verify_transport_ms: float = 0.0
    """Computing in gateway and gRPC for the verifier's part of a round."""
    draft_transport_ms: float = 0.0
    """The same for the drafter's part."""
    prefill_ms: float = 0.0
    """Time to the first token that does not depend on the prompt."""
    prefill_token_ms: float = 0.0
    """What each token of the prompt adds to it."""

    def step_ms(self, batch: Sequence[Job]) -> float:
        """Return what a step of the verifier takes."""
        num_rounds = sum(job.is_urgent for job in batch)
        prompt_tokens = sum(job.num_tokens for job in batch if not job.is_urgent)
        pass_ms = self.pass_ms(num_rounds * (1 + self.num_draft_tokens)) if num_rounds else self.prefill_ms
        return pass_ms + prompt_tokens * self.prefill_token_ms

    def draft_step_ms(self, batch: Sequence[Job]) -> float:
        """Return what a step of the drafter takes."""
        return self.draft_ms * math.pow(self.draft_growth, math.log2(len(batch)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The system that is asked for."""

    num_verifiers: int = 1
    num_drafters: int = 1
    num_gateways: int = 1
    placement: str = APART
    """Who shares a processor with whom: APART, SHARED or TOGETHER."""
    verifier_rtt_ms: float = 0.0
    """Round-trip time between gateway and verifier that a network adds."""
    drafter_rtt_ms: float = 0.0
    """The same between gateway and drafter."""
    link_mbit_s: float = 0.0
    """What the link of each verifier carries of streamed state, Mbit/s; 0: any amount in no time."""
    state_bytes: int = 0
    """Target state that is streamed to the drafter, bytes per token; 0: none."""
    concurrency: int = 1
    """Requests under way at a time, in the whole system."""
    ahead: float = 0.0
    """Share of the rounds whose draft is made while the pass before still runs, 0 to 1: the drafter guessed
    how that pass would end."""

    @property
    def num_processors(self) -> int:
        """How many processors, or GPUs, the verifiers and drafters have."""
        return self.num_verifiers + {APART: self.num_drafters, SHARED: 0, TOGETHER: 1}[self.placement]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the system gives."""

    tokens_per_s: float
    """Tokens a second of all requests together, while as many as asked for are under way."""
    acceptance_length: float
    """Tokens of a round."""
    ttft_ms: float
    """Median time to the first token."""
    tpot_ms: float
    """Median time per output token after the first."""
    total_ms: float
    """Median time of an answer."""
    total_ms_p90: float
    """What nine of ten answers take at most."""
    verifier_busy: float
    """Share of the time in which a verifier computes, 0 to 1, over all of them."""
    drafter_busy: float
    """The same of the drafters."""
    wall_ms: float
    """Time until the last answer ended."""


def simulate(costs: MethodCosts, cluster: Cluster, answers: Sequence[AnswerShape]) -> Prediction:
    """Return what it is like when the answers are asked for, the next one whenever one has ended.

    Args:
        answers: at least one.
    """
    system = _System(costs, cluster, answers)
    system.run()
    return system.prediction()


class _System:
    def __init__(self, costs: MethodCosts, cluster: Cluster, answers: Sequence[AnswerShape]) -> None:
        self._costs, self._cluster, self._answers = costs, cluster, answers
        self._clock = clock = Clock()
        own = [Processor(clock) for _ in range(cluster.num_verifiers)]
        others = [Processor(clock) for _ in range(cluster.num_processors - cluster.num_verifiers)] or own
        self._verifiers = [
            Engine(clock, processor, costs.step_ms, _PREFILL_CHUNK_TOKENS) for processor in own
        ]
        self._drafters = [
            Engine(clock, others[index % len(others)], costs.draft_step_ms)
            for index in range(cluster.num_drafters)
        ]
        self._links = [Processor(clock) for _ in own]
        self._gateways = [Processor(clock) for _ in range(cluster.num_gateways)]
        self._waiting = deque(answers)
        self._random = Random(0)
        self._num_tokens = 0
        self._ended_ms = 0.0
        self._busy_until: tuple[float, int] | None = None
        """When there was nothing left to begin, and the tokens until then."""
        self._times: list[tuple[float, float, float]] = []
        """Time to the first token, time per token and total time of each answer, milliseconds."""

    def run(self) -> None:
        for index in range(min(self._cluster.concurrency, len(self._waiting))):
            self._clock.start(self._client(index))
        self._clock.run()

    def _client(self, index: int) -> Task:
        session = _Session(
            self._verifiers[index % len(self._verifiers)],
            self._drafters[index % len(self._drafters)],
            self._links[index % len(self._links)],
            self._gateways[index % len(self._gateways)],
        )
        while self._waiting:
            yield from self._answer(session, self._waiting.popleft())
        self._busy_until = self._busy_until or (self._clock.now_ms, self._num_tokens)
        self._ended_ms = self._clock.now_ms
        session.verifier.forget(session)
        session.drafter.forget(session)

    def _answer(self, session: _Session, answer: AnswerShape) -> Generator[Wait]:
        clock = self._clock
        started_ms = clock.now_ms
        yield from self._prefill(session, answer.prompt_tokens)
        first_ms = clock.now_ms
        self._num_tokens += 1
        unread = answer.prompt_tokens  # tokens whose state the drafter has not read yet
        ahead = None
        for accepted in answer.accepted:
            if ahead and self._random.random() < self._cluster.ahead:
                yield ahead.wait
            elif self._costs.num_draft_tokens:
                yield from self._draft(session, unread)
            if self._cluster.ahead:
                ahead = clock.start(self._draft_ahead(session))
            yield from self._verify(session)
            self._num_tokens += accepted + 1
            unread = accepted + 1
        num_later = answer.num_tokens - 1
        tpot_ms = (clock.now_ms - first_ms) / num_later if num_later else 0.0
        self._times.append((first_ms - started_ms, tpot_ms, clock.now_ms - started_ms))

    def _prefill(self, session: _Session, num_tokens: int) -> Generator[Wait]:
        yield self._clock.wait(self._cluster.verifier_rtt_ms)
        num_chunks = math.ceil(num_tokens / _PREFILL_CHUNK_TOKENS)
        for chunk in range(num_chunks):
            size = min(_PREFILL_CHUNK_TOKENS, num_tokens - chunk * _PREFILL_CHUNK_TOKENS)
            yield session.verifier.run(Job(size, session, is_urgent=False))

    def _draft(self, session: _Session, num_new_tokens: int) -> Generator[Wait]:
        state = self._clock.start(self._stream(session, num_new_tokens))
        yield session.gateway.run(self._costs.draft_transport_ms)
        yield self._clock.wait(self._cluster.drafter_rtt_ms)
        yield state.wait
        yield session.drafter.run(Job(1, session))

    def _draft_ahead(self, session: _Session) -> Task:
        yield session.drafter.run(Job(1, session))
        yield self._clock.wait(self._cluster.drafter_rtt_ms / 2)

    def _stream(self, session: _Session, num_tokens: int) -> Task:
        num_bits = 8 * num_tokens * self._cluster.state_bytes
        if num_bits and self._cluster.link_mbit_s:
            yield session.link.run(num_bits / (self._cluster.link_mbit_s * _BITS_PER_MS))

    def _verify(self, session: _Session) -> Generator[Wait]:
        yield session.gateway.run(self._costs.verify_transport_ms)
        yield self._clock.wait(self._cluster.verifier_rtt_ms)
        yield session.verifier.run(Job(1 + round(self._costs.num_draft_tokens), session))

    def prediction(self) -> Prediction:
        assert self._busy_until
        until_ms, num_tokens = self._busy_until
        ttft_ms, tpot_ms, total_ms = (list(times) for times in zip(*self._times, strict=True))
        num_rounds = sum(len(answer.accepted) for answer in self._answers)
        return Prediction(
            tokens_per_s=1000 * num_tokens / until_ms,
            acceptance_length=1 + sum(sum(answer.accepted) for answer in self._answers) / max(1, num_rounds),
            ttft_ms=median(ttft_ms),
            tpot_ms=median(tpot_ms),
            total_ms=median(total_ms),
            total_ms_p90=quantiles([*total_ms, total_ms[-1]], n=10)[-1],
            verifier_busy=self._busy_share(self._verifiers),
            drafter_busy=self._busy_share(self._drafters),
            wall_ms=self._ended_ms,
        )

    def _busy_share(self, engines: Sequence[Engine]) -> float:
        return sum(engine.busy_ms for engine in engines) / len(engines) / self._ended_ms


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    """Who serves the requests of a client, one after the other."""

    verifier: Engine
    drafter: Engine
    link: Processor
    gateway: Processor
