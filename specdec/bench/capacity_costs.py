"""What the capacity model takes from a trace and from the measured cost of passes."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import linear_regression, mean

from specdec.bench.capacity import AnswerShape, MethodCosts
from specdec.bench.records import METHOD_SEPARATOR, NODES_SEPARATOR
from specdec.bench.trace import ArmTrace, Trace
from specdec.bench.verify_pass import CHAIN
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import PLAIN

_UNKNOWN_PROMPT = 100
"""Tokens of a prompt where the trace has not recorded it."""
DEFAULT_TRACE = Path(__file__).with_name("trace.json")
"""A trace of the embedded model, for predictions where none is named."""


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        InvalidArgumentError: the file is not a trace.json.
    """
    try:
        trace = Trace.read(path)
        _plain(trace)
        return trace
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        message = f"{path} is not a trace.json of `specdec bench trace`: {error!r}."
        raise InvalidArgumentError(message) from error


class Line:
    """A quantity by size, straight between the points that are known and beyond them."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._points = sorted(points)

    def __call__(self, size: float) -> float:
        points = self._points
        if len(points) == 1:
            return points[0][1]
        index = min(max(bisect_left(points, (size,)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0)) if x1 > x0 else y0


def rising(points: Sequence[tuple[float, float]]) -> Line:
    """Return the largest curve that rises and is above none of the points."""
    least = accumulate(sorted(points, reverse=True), lambda before, each: (each[0], min(before[1], each[1])))
    return Line(list(least))


def pass_line(trace: Trace) -> Line:
    """Return what passes take at most by their tokens, as far as a trace says.

    Rounds of several requests count as passes of all of them. They include what the requests waited, so the
    least time of as many tokens or more is taken.
    """
    return _continued(
        [
            (num_under_way(trace, number) * (1 + costs.num_draft_tokens), costs.verify_ms)
            for arm in trace.arms
            for number, costs in arm.costs.items()
        ]
    )


def _continued(points: Sequence[tuple[float, float]]) -> Line:
    """Return the rising curve of points, which goes on behind the last one as steep as it was on the whole:
    its last piece may be flat by chance.
    """
    line, first, last = rising(points), min(points)[0], max(points)[0]
    slope = (line(last) - line(first)) / (last - first) if last > first else 0.0
    return rising([*points, (2 * last, line(last) + slope * last)])


def read_pass_line(path: Path) -> Line:
    """Return what passes over chains take by their tokens, from a pass.json.

    Raises:
        InvalidArgumentError: the file is not a pass.json.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        points = [(row["num_tokens"], row["compute_ms_p50"]) for row in rows if row["shape"] == CHAIN]
        return _continued(points)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidArgumentError(
            f"{path} is not a pass.json of `specdec bench pass`: {error!r}."
        ) from error


def method_costs(
    trace: Trace,
    passes: Callable[[float], float] | None = None,
    draft_growth: float = 1.4,
    *,
    keeps_own_pass: bool = True,
) -> list[MethodCosts]:
    """Return the costs of all methods and sizes of a trace, plain decoding first.

    Args:
        passes: what passes take by their tokens; None: as the trace says.
        keeps_own_pass: whether a method's pass for one request takes what the trace says, and `passes` says
            what further tokens add; otherwise all passes take what `passes` says.
    """
    passes = passes or pass_line(trace)
    plain = _plain(trace)
    prefill_ms, token_ms = _prefill(trace, passes)
    least = min(plain.costs)
    way_ms = plain.costs[least].transport_ms + plain.costs[least].gateway_ms
    made = []
    for arm in sorted(trace.arms, key=lambda each: each is not plain):
        costs = arm.costs[least]
        made.append(
            MethodCosts(
                name=name_of(arm),
                pass_ms=_own_pass(passes, 1 + costs.num_draft_tokens, costs.verify_ms)
                if keeps_own_pass
                else passes,
                draft_ms=costs.draft_ms,
                draft_growth=draft_growth,
                num_draft_tokens=costs.num_draft_tokens,
                verify_transport_ms=way_ms,
                draft_transport_ms=max(0.0, costs.transport_ms + costs.gateway_ms - way_ms),
                prefill_ms=prefill_ms,
                prefill_token_ms=token_ms,
            )
        )
    return made


def name_of(arm: ArmTrace) -> str:
    """Return METHOD/NODES@K, without what is not there."""
    nodes = f"{NODES_SEPARATOR}{arm.draft_nodes}" if arm.draft_nodes else ""
    return f"{arm.method}{nodes}{METHOD_SEPARATOR}{arm.draft_depth}" if arm.draft_depth else PLAIN


def answer_shapes(
    trace: Trace, name: str, num_answers: int, prompt_tokens: int | None, answer_tokens: int | None
) -> list[AnswerShape]:
    """Return so many answers like those of a trace, from the first again after the last.

    Args:
        name: the method and its size; see `name_of`.
        prompt_tokens: length of every prompt; None: as recorded, or 100 where the trace has not recorded it.
        answer_tokens: length of every answer, whose rounds repeat those recorded; None: as recorded.
    """
    arm = next(arm for arm in trace.arms if name_of(arm) == name)
    lengths = [prompt.input_tokens for prompt in trace.prompts] or [_UNKNOWN_PROMPT] * len(arm.accepted)
    shapes = [
        AnswerShape(prompt_tokens or length, tuple(_rounds(accepted, answer_tokens)))
        for length, accepted in zip(lengths, arm.accepted, strict=True)
    ]
    return [shapes[index % len(shapes)] for index in range(num_answers)]


def num_under_way(trace: Trace, load: int) -> int:
    """Return how many requests were under way where so many might have been: at most as many as prompts."""
    return min(load, len(_plain(trace).accepted))


def recorded_round_ms(trace: Trace, name: str, load: int) -> float:
    """Return what a round took in a trace, with so many requests under way, milliseconds."""
    costs = next(arm.costs[load] for arm in trace.arms if name_of(arm) == name)
    return costs.draft_ms + costs.verify_ms + costs.transport_ms + costs.gateway_ms


def _rounds(accepted: Sequence[int], answer_tokens: int | None) -> list[int]:
    if answer_tokens is None or not accepted:
        return list(accepted)
    rounds, left = list[int](), answer_tokens - 1
    while left > 0:
        # The last round brings only what the answer still lacks.
        rounds.append(min(accepted[len(rounds) % len(accepted)], left - 1))
        left -= rounds[-1] + 1
    return rounds


def _plain(trace: Trace) -> ArmTrace:
    return next(arm for arm in trace.arms if not arm.draft_depth)


def _own_pass(passes: Callable[[float], float], num_tokens: float, own_ms: float) -> Callable[[float], float]:
    return lambda size: max(0.0, own_ms + passes(size) - passes(num_tokens))


def _prefill(trace: Trace, passes: Callable[[float], float]) -> tuple[float, float]:
    """Return the time to the first token without a prompt, and what each token adds, milliseconds.

    Where the trace has no prompts, a prompt costs what a pass over as many tokens does.
    """
    lengths = [prompt.input_tokens for prompt in trace.prompts]
    times_ms = [prompt.ttft_ms for prompt in trace.prompts]
    if not times_ms:
        return passes(1), (passes(_UNKNOWN_PROMPT) - passes(1)) / _UNKNOWN_PROMPT
    if len(set(lengths)) < 2:
        return mean(times_ms), 0.0
    slope, base = linear_regression(lengths, times_ms)
    return (base, slope) if slope > 0 and base > 0 else (0.0, mean(times_ms) / mean(lengths))
