"""The standard streams of the command line: all that it reads from them and writes to them."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

import click


class OutputError(click.ClickException):
    """Standard output takes no more. No command goes on after it, whatever it does about other errors."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the error as all others are printed."""
        report(f"error: {self.message}")


class _CheckedStream:
    """A standard stream of which nothing is asked any more once it failed. All else is the stream's own.

    Args:
        stream: what is written to.
        name: how a message calls the stream; empty: that it fails is nobody's concern.
    """

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self._stream = stream
        self._name = name
        self._failure = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; see `_do`."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush; see `_do`."""
        self._do(self._stream.flush)

    def _do(self, operation: Callable[[], object]) -> None:
        """Run an operation of the stream.

        Raises:
            OutputError: it failed, or one before it did, and the stream has a name.
        """
        try:
            if not self._failure:
                operation()
        except OSError as error:
            self._failure = error.strerror or str(error)
            self._drop_the_rest()
        if self._failure and self._name:
            raise OutputError(
                f"{self._name} cannot be written ({self._failure}), and what is missing of it is lost; send "
                "it to a file or a program that takes all of it."
            )

    def _drop_the_rest(self) -> None:
        """Have what the stream still holds go nowhere: the interpreter flushes it when it ends."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the standard streams fit for any text within the block, whatever they are.

    A character that the encoding of an output lacks is written as its escape. What cannot be written to
    standard output raises OutputError; what cannot be written to standard error is dropped. Input that is
    not from a terminal is UTF-8, and bytes that are not valid become lone surrogates. A closed standard input
    is an empty one.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    # A closed stream is None. What stands in for standard output cannot be written to either.
    inputs = before[0] or os.fdopen(os.open(os.devnull, os.O_RDONLY))
    output = before[1] or os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    messages = before[2] or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    _reconfigure(inputs, encoding=None if inputs.isatty() else "utf-8-sig", errors="surrogateescape")
    for stream in (output, messages):
        _reconfigure(stream, errors="backslashreplace")
    sys.stdin = inputs
    sys.stdout = cast(TextIO, _CheckedStream(output, "Standard output"))
    sys.stderr = cast(TextIO, _CheckedStream(messages))
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _reconfigure(stream: TextIO, **settings: Any) -> None:
    # A stream that was read from already keeps its encoding, and what is no file has none.
    if isinstance(stream, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):
            stream.reconfigure(**settings)


def show(line: str) -> None:
    """Print a line of the result.

    Raises:
        OutputError: standard output takes no more.
    """
    print(line, flush=True)


def show_json(value: object) -> None:
    """Print a JSON document of one line, as text that every reader of JSON takes.

    Raises:
        OutputError: standard output takes no more.
    """
    # Escapes of other encodings are not those of JSON, which has its own.
    is_unicode = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    show(json.dumps(value, ensure_ascii=not is_unicode))


def report(line: str) -> None:
    """Print a line that is not part of the result, to standard error."""
    print(line, file=sys.stderr, flush=True)


def read_input() -> str:
    """Return all of standard input, as UTF-8 with or without a byte order mark.

    Bytes that are not valid become lone surrogates, which the client refuses with a clear error.
    """
    return sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape")
