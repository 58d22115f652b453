"""Answers as they come: the token streams of the two clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc

from specdec.client.generation import Generation, Started, Token
from specdec.client.wire import ResponseFold
from specdec.contract.errors import FailedPreconditionError, RequestCancelledError, SpecdecError

ToError = Callable[[grpc.RpcError], SpecdecError]


class _Stream:
    """What the two streams share: the call, the fold of its responses and how to stop it."""

    def __init__(self, call: Any, to_error: ToError) -> None:
        self._call = call
        self._to_error = to_error
        self._fold = ResponseFold()
        self._result: Generation | None = None

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


class GenerationStream(_Stream):
    """The tokens of one answer as they come; made by `Client.stream`."""

    def __init__(self, call: Any, to_error: ToError) -> None:
        super().__init__(call, to_error)
        self._tokens = self._read()

    def _read(self) -> Iterator[Token]:
        try:
            for response in self._call:
                yield from self._fold.add(response)
        except grpc.RpcError as error:
            raise self._to_error(error) from error
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

    def __init__(self, call: Any, to_error: ToError) -> None:
        super().__init__(call, to_error)
        self._tokens = self._read()

    async def _read(self) -> AsyncIterator[Token]:
        try:
            async for response in self._call:
                for token in self._fold.add(response):
                    yield token
        except grpc.RpcError as error:
            raise self._to_error(error) from error
        except asyncio.CancelledError:
            # grpc.aio raises this for a call that was cancelled, too; only a cancelled task may see it.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestCancelledError("The generation was cancelled.") from None
        self._result = self._fold.result()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    async def __anext__(self) -> Token:
        return await anext(self._tokens)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
