"""The side of a peer: a program that answers JSON lines on stdin by JSON lines on stdout.

It writes `{"ready": true, "versions", "threads", "precision"}` once its model is loaded. Then it answers
prompts:

    {"prompt_token_ids", "max_new_tokens", "temperature", "seed"}
                             {"token_ids", "ttft_ms", "tpot_ms", "total_ms", "finish_reason"}

or, started with --passes, it runs single passes:

    {"context_token_ids"}    {}: the cache holds these tokens now
    {"pass_token_ids"}       {"pass_ns"}: the time of a pass over the cache, which keeps the first token

What fails is answered by `{"error"}`. The program ends when stdin does. It runs in other environments as
well: this module imports nothing but the standard library.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

MAX_NGRAM_TOKENS = 3
"""Longest n-gram that prompt lookup searches for, tokens."""


Request = dict[str, Any]
Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded engine."""

    description: Reply
    """What the results should say of the engine: "versions", "threads" and "precision"."""
    answer: Callable[[Request], Reply]
    """Answers a request."""


class PassEngine(Protocol):
    """An engine that runs single passes over a cache."""

    def fill_cache(self, token_ids: list[int]) -> None:
        """Let the cache hold these tokens and no others."""

    def time_pass(self, token_ids: list[int]) -> int:
        """Return the time of a pass over the cache, which keeps the first token, nanoseconds.

        The time includes the arg max of every row, as a verify pass does.
        """


def answer_passes(engine: PassEngine) -> Callable[[Request], Reply]:
    """Return how an engine answers requests for passes."""

    def answer(request: Request) -> Reply:
        if "context_token_ids" in request:
            engine.fill_cache(request["context_token_ids"])
            return {}
        return {"pass_ns": engine.time_pass(request["pass_token_ids"])}

    return answer


class TokenClock:
    """Notes when the tokens of an answer arrive; it starts when it is made."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._arrivals: list[tuple[float, int]] = []

    def note(self, num_tokens: int) -> None:
        """Note that so many tokens have arrived."""
        self._arrivals.append(((time.perf_counter() - self._started_s) * 1e3, num_tokens))

    def times(self) -> dict[str, float | None]:
        """Return the times of a reply, milliseconds."""
        first_ms, num_first = self._arrivals[0]
        last_ms, _ = self._arrivals[-1]
        num_later = sum(num_tokens for _, num_tokens in self._arrivals) - num_first
        tpot_ms = (last_ms - first_ms) / num_later if num_later else None
        return {"ttft_ms": first_ms, "tpot_ms": tpot_ms, "total_ms": last_ms}


def finish_reason(token_ids: Sequence[int], eos_token_ids: Collection[int]) -> str:
    """Return why an answer ended."""
    return "stop_token" if token_ids[-1] in eos_token_ids else "length"


def run(load: Callable[[], Served]) -> None:
    """Load an engine and serve it over stdin and stdout."""
    # Ctrl-C in a terminal reaches this process as well. Whoever started it decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Stdout carries the replies, and libraries print to it now and then.
    replies, sys.stdout = sys.stdout, sys.stderr
    serve(load(), sys.stdin, replies)


def serve(engine: Served, requests: TextIO, replies: TextIO) -> None:
    """Answer requests line by line until their stream ends."""
    _reply(replies, {"ready": True, **engine.description})
    for line in requests:
        try:
            reply = engine.answer(json.loads(line))
        except Exception as error:  # whatever one prompt provokes must not end the worker
            reply = {"error": f"{type(error).__name__}: {error}"}
        _reply(replies, reply)


def _reply(replies: TextIO, reply: Reply) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
