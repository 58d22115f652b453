"""Sessions replayed on a recorded trace: rounds cost and bring what the trace says, in simulated time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

from gateway.rounds.vocabulary import PLAIN_SIZE, Draft, DraftSize, Round, SizeControl, Verified
from specdec.bench.capacity_costs import Line, rising
from specdec.bench.trace import ArmTrace, RoundCosts, Trace
from specdec.runtime.scheduler import Scheduler

_NS_PER_MS = 1e6
_ROUNDS_TO_OPEN = 3
"""How many rounds a drafter takes to open in the simulation."""


class Arms:
    """A method with one node budget, at one number of requests under way.

    Where drafters compute while the verifier does, on the same cores, passes take longer. What a pass took
    beyond what it takes beside other drafters counts as time of the draft.
    """

    def __init__(self, arms: Sequence[ArmTrace], concurrency: int, plain: RoundCosts, pass_ms: Line) -> None:
        costs = [(arm.draft_depth, arm.costs[concurrency]) for arm in arms]
        beyond_ms = [
            max(0.0, each.verify_ms - pass_ms(concurrency * (1 + each.num_draft_tokens))) for _, each in costs
        ]
        self.draft_ms = Line(
            [
                (0, 0.0),
                *((depth, each.draft_ms + ms) for (depth, each), ms in zip(costs, beyond_ms, strict=True)),
            ]
        )
        self.num_tokens = Line([(0, 0.0), *((depth, each.num_draft_tokens) for depth, each in costs)])
        self.wire_ms = max(0.0, min(each.transport_ms for _, each in costs) - plain.transport_ms)
        deepest = max(arms, key=lambda arm: arm.draft_depth)
        self._accepted = deepest.accepted
        self._starts = [list(accumulate((n + 1 for n in prompt), initial=1)) for prompt in self._accepted]

    def accepted(self, prompt: int, position: int, depth: int) -> int:
        """Return how much of a draft there would be accepted: as of the recorded round next to it."""
        starts, accepted = self._starts[prompt], self._accepted[prompt]
        index = min(range(len(accepted)), key=lambda each: abs(starts[each] - position))
        return min(depth, accepted[index])


class Session:
    """One answer under way, and the job that it gives the verifier."""

    is_urgent, is_cancelled = True, False

    def __init__(self, prompt: int, length: int, control: SizeControl) -> None:
        self.prompt, self.length, self.control = prompt, length, control
        self.position = 1
        self.size, self.draft = PLAIN_SIZE, Draft()
        """Of the round under way."""
        self.arrives_ms = 0.0
        """When its draft is at the verifier."""
        self.is_on_the_way = False
        self._joined: Counter[str] = Counter({control.first_method: _ROUNDS_TO_OPEN})
        control.follow(self._is_open)

    @property
    def num_tokens(self) -> int:
        """Tokens of its next pass."""
        return len(self.draft.token_ids) + 1

    @property
    def source(self) -> int:
        """Who sends one job after the other."""
        return id(self)

    def _is_open(self, method: str) -> bool:
        return self._joined[method] >= _ROUNDS_TO_OPEN

    def choose(self) -> DraftSize:
        size = self.control.choose(self.length - self.position - 1)
        self._joined[size.joining] += 1
        return size


class Replay:
    """A verifier and its drafters as a trace has them, with so many requests under way."""

    def __init__(self, trace: Trace, concurrency: int) -> None:
        self.concurrency = concurrency
        plain = next(arm for arm in trace.arms if not arm.draft_depth)
        self._plain = plain.costs[concurrency]
        self._lengths = [len(rounds) + 1 for rounds in plain.accepted]
        self.methods = dict.fromkeys(arm.method for arm in trace.arms if arm.draft_depth)
        self.budgets = sorted({arm.draft_nodes for arm in trace.arms})
        self.depths = sorted({arm.draft_depth for arm in trace.arms} - {0})
        costs = [arm.costs[concurrency] for arm in trace.arms]
        points = [(concurrency * (1 + each.num_draft_tokens), each.verify_ms) for each in costs]
        self._pass_ms = rising(points)
        self._arms = {
            (method, budget): Arms(
                [arm for arm in trace.arms if (arm.method, arm.draft_nodes) == (method, budget)],
                concurrency,
                self._plain,
                self._pass_ms,
            )
            for method in self.methods
            for budget in self.budgets
        }

    def run(self, new_control: Callable[[], SizeControl], num_answers: int) -> float:
        """Return the tokens a second of so many answers."""
        waiting = [index % len(self._lengths) for index in range(num_answers)]
        sessions, scheduler = list[Session](), Scheduler[Session]()
        num_tokens, now_ms = 0, 0.0
        while waiting or sessions:
            while waiting and len(sessions) < self.concurrency:
                prompt = waiting.pop(0)
                sessions.append(Session(prompt, self._lengths[prompt], new_control()))
                self._begin(sessions[-1], now_ms)
            now_ms, batch = self._next_pass(scheduler, sessions, now_ms)
            rows = sum(session.num_tokens for session in batch)
            began_ms, pass_ms = now_ms, self._pass_ms(rows)
            now_ms += pass_ms
            scheduler.finish(batch, int(began_ms * _NS_PER_MS), int(now_ms * _NS_PER_MS))
            for session in batch:
                num_tokens += self._end(session, now_ms, pass_ms, len(batch), rows)
                if session.position >= session.length:
                    scheduler.forget(session.source)
            sessions = [session for session in sessions if session.position < session.length]
        return 1000 * num_tokens / now_ms

    def _next_pass(
        self, scheduler: Scheduler[Session], sessions: Sequence[Session], free_at_ms: float
    ) -> tuple[float, list[Session]]:
        """Return when the next pass begins and who is in it, as the verifier's own scheduler has it."""
        on_the_way = sorted(
            (session for session in sessions if session.is_on_the_way),
            key=lambda session: session.arrives_ms,
        )
        now_ms = free_at_ms
        while True:
            while on_the_way and (on_the_way[0].arrives_ms <= now_ms or not scheduler.num_waiting):
                session = on_the_way.pop(0)
                now_ms = max(now_ms, session.arrives_ms)
                session.is_on_the_way = False
                scheduler.add(session, int(session.arrives_ms * _NS_PER_MS))
            batch = scheduler.take(int(now_ms * _NS_PER_MS))
            if batch:
                return now_ms, batch
            # It waits for somebody until a time: whoever comes first.
            until_ms = now_ms + (scheduler.wait_s(int(now_ms * _NS_PER_MS)) or 0.0) * 1000 + 1e-6
            now_ms = min(until_ms, on_the_way[0].arrives_ms) if on_the_way else until_ms

    def _begin(self, session: Session, now_ms: float) -> None:
        session.size = session.choose()
        session.draft = self._draft(session.size)
        transport_ms = self._plain.transport_ms
        session.is_on_the_way = True
        session.arrives_ms = now_ms + session.draft.elapsed_ns / _NS_PER_MS + transport_ms

    def _end(self, session: Session, now_ms: float, pass_ms: float, batch_size: int, rows: int) -> int:
        """End a session's round and begin its next; return the tokens that it brought."""
        accepted, size = 0, session.size
        if size.draft_depth:
            arms = self._arms[size.method, size.draft_nodes]
            accepted = arms.accepted(session.prompt, session.position, size.draft_depth)
        accepted = min(accepted, session.length - session.position - 1)
        waited_ms = now_ms - session.arrives_ms
        verified = Verified(
            accepted,
            0,
            server_ns=int(waited_ms * _NS_PER_MS),
            compute_ns=int(pass_ms * _NS_PER_MS),
            elapsed_ns=int((waited_ms + self._plain.transport_ms) * _NS_PER_MS),
            batch_size=batch_size,
            batch_tokens=rows,
        )
        session.control.observe(size, Round(session.draft, verified))
        session.position += accepted + 1
        if session.position < session.length:
            self._begin(session, now_ms)
        else:
            session.control.close()
        return accepted + 1

    def _draft(self, size: DraftSize) -> Draft:
        if not size.draft_depth:
            return Draft()
        arms = self._arms[size.method, size.draft_nodes]
        draft_ns = arms.draft_ms(size.draft_depth) * _NS_PER_MS
        return Draft(
            tuple(range(round(arms.num_tokens(size.draft_depth)))),
            server_ns=int(draft_ns),
            elapsed_ns=int(draft_ns + arms.wire_ms * _NS_PER_MS),
            compute_ns=int(draft_ns / self.concurrency),
        )
