"""The generations behind one HTTP request: they run side by side, and end when their client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from gateway.generations import Generations
from specdec.client.generation import Generation, Started, Token
from specdec.client.wire import ResponseFold
from specdec.contract.request_id import REQUEST_ID
from specdec.v1 import gateway_pb2

_MAX_STEM = 120
"""Characters of a request's id that the ids of its choices keep, so that they are lawful ids."""

Take = Callable[["Choice", Sequence[Token]], Awaitable[None]]
"""Takes the tokens of a choice as they come. A round may release none."""
Finish = Callable[["Choice"], Awaitable[None]]
"""Is told of a choice that is whole."""


class Choice:
    """One of the answers to a request, as far as it has come."""

    def __init__(self, index: int, take: Take) -> None:
        self.index = index
        self.num_characters = 0
        """Length of the text so far, without what is being taken."""
        self._take = take
        self._fold = ResponseFold()

    @property
    def started(self) -> Started:
        """What the gateway settled before the first token."""
        assert self._fold.started is not None
        return self._fold.started

    def remaining_s(self) -> float | None:
        """Return None: HTTP has no deadlines; a client that waits no longer goes away."""
        return None

    async def send(self, response: gateway_pb2.GenerateResponse) -> None:
        """Take in a message of the answer."""
        tokens = self._fold.add(response)
        if response.HasField("chunk"):
            await self._take(self, tokens)
            self.num_characters += sum(len(token.text) for token in tokens)

    def result(self) -> Generation:
        """Return the whole answer."""
        return self._fold.result()


async def run_choices(
    generations: Generations,
    requests: Sequence[gateway_pb2.GenerateRequest],
    take: Take,
    receive: Receive,
    *,
    traceparent: str,
    finish: Finish,
) -> list[Generation]:
    """Run a generation for each request, and return the answers in their order.

    The first that fails ends the others, and so does a client that goes.

    Args:
        take: gets the tokens of each choice as they come.
        receive: tells when the client has gone; the body was read.
        finish: called when a choice is whole.

    Raises:
        ClientDisconnect: the client has gone.
        SpecdecError: a request is refused, or an answer broke off.
    """
    choices = [Choice(index, take) for index in range(len(requests))]

    async def run(choice: Choice) -> None:
        if len(choices) > 1:
            REQUEST_ID.set(f"{REQUEST_ID.get()[:_MAX_STEM]}-{choice.index}")
        await generations.run(requests[choice.index], choice, traceparent=traceparent)
        await finish(choice)

    running = {asyncio.ensure_future(run(choice)) for choice in choices}
    gone = asyncio.ensure_future(_gone(receive))
    tasks = {gone, *running}
    try:
        while running:
            done, _ = await asyncio.wait({gone, *running}, return_when=asyncio.FIRST_COMPLETED)
            if gone in done:
                raise ClientDisconnect
            for task in done:
                task.result()
            running -= done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [choice.result() for choice in choices]


async def _gone(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
