"""A worker of a peer that does as it is told, and runs that use it."""

from __future__ import annotations

import sys

from specdec.bench.peers.process import PeerBackend
from specdec.bench.workload import Prompt
from specdec.client import GenerateOptions

FAIL, END, HANG = 1, 2, 3
"""Prompts that fail, that end the worker, and that it does not answer."""

WORKER = f"""
import os, sys, time
from specdec.bench.peers.worker import Served, run

def answer(request):
    token_id = request["prompt_token_ids"][0]
    if token_id == {FAIL}:
        raise ValueError("one")
    if token_id == {END}:
        print("so long", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)
    if token_id == {HANG}:
        time.sleep(600)
    print("not a reply")
    times = {{"ttft_ms": 1.0, "tpot_ms": None, "total_ms": 1.0}}
    return {{"token_ids": [os.getpid()], "finish_reason": "length", **times}}

run(lambda: Served({{"precision": "float32"}}, answer))
"""
"""A worker that answers other prompts with its pid."""

BUSY_RUN = """
import asyncio
import signal
from tests.scripted_peer import HANG, pid_of, prompt, scripted

# A shell's background job, and so its children, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    async with scripted() as peer:
        print(await pid_of(peer), flush=True)
        await peer.generate(prompt(HANG))

asyncio.run(main())
"""
"""A run that prints the pid of its worker, which is busy then."""

IDLE_RUN = BUSY_RUN.replace("peer.generate(prompt(HANG))", "asyncio.sleep(600)")
"""The same with a worker that has nothing to do."""


def scripted(timeout_s: float = 60.0) -> PeerBackend:
    """Return the worker, which is not started yet."""
    options = GenerateOptions(max_new_tokens=1)
    return PeerBackend("scripted", [sys.executable, "-c", WORKER], options, timeout_s)


def prompt(token_id: int) -> Prompt:
    """Return a prompt of one token."""
    return Prompt(token_id, "a", "x", token_ids=(token_id,))


async def pid_of(peer: PeerBackend) -> int:
    """Return the pid of a worker."""
    return (await peer.generate(prompt(0))).token_ids[0]
