"""Answers as they come: the token streams of the two clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Self

from specdec.client.generation import Generation, Started, Token
from specdec.client.transport import AsyncCall, Call
from specdec.client.wire import ResponseFold
from specdec.contract.errors import FailedPreconditionError, SpecdecError


class _Stream:
    """What the two streams share: the call, the fold of its responses and how to stop it."""

    def __init__(self, call: Call | AsyncCall, request_id: str = "") -> None:
        self._call = call
        self._request_id = request_id
        self._fold = ResponseFold()
        self._result: Generation | None = None

    def __repr__(self) -> str:
        request = f" {self.started.request_id!r}" if self.started else ""
        state = "complete" if self._result else "under way"
        return f"<{type(self).__name__}{request}, {self._fold.num_tokens} tokens, {state}>"

    @property
    def started(self) -> Started | None:
        """The gateway's acceptance; None before it arrived, which is before the first token."""
        return self._fold.started

    @property
    def result(self) -> Generation:
        """The whole answer, once the iteration has ended.

        Raises:
            FailedPreconditionError: the iteration has not ended.
        """
        if self._result is None:
            raise FailedPreconditionError("The answer is not complete; iterate to the end first.")
        return self._result

    def cancel(self) -> None:
        """Stop the generation; an iteration under way raises RequestCancelledError."""
        self._call.cancel()

    @contextmanager
    def _naming_the_request(self) -> Iterator[None]:
        """Name the request in an error. A connection that breaks does not say whose answer it carried; the
        request or its beginning did.
        """
        try:
            yield
        except SpecdecError as error:
            known = self.started.request_id if self.started else self._request_id
            error.request_id = error.request_id or known
            raise


class GenerationStream(_Stream):
    """The tokens of one answer as they come; made by `Client.stream`."""

    def __init__(self, call: Call, request_id: str = "") -> None:
        super().__init__(call, request_id)
        self._tokens = self._read(call)

    def _read(self, call: Call) -> Iterator[Token]:
        with self._naming_the_request():
            for response in call:
                yield from self._fold.add(response)
            self._result = self._fold.result()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def __next__(self) -> Token:
        return next(self._tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncGenerationStream(_Stream):
    """The tokens of one answer as they come; made by `AsyncClient.stream`."""

    def __init__(self, call: AsyncCall, request_id: str = "") -> None:
        super().__init__(call, request_id)
        self._tokens = self._read(call)

    async def _read(self, call: AsyncCall) -> AsyncIterator[Token]:
        with self._naming_the_request():
            async for response in call:
                for token in self._fold.add(response):
                    yield token
            self._result = self._fold.result()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    async def __anext__(self) -> Token:
        return await anext(self._tokens)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
