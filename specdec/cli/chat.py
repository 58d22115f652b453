"""`specdec chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from specdec.cli.groups import describe_error
from specdec.cli.render import AnswerPrinter, console, print_closing_line
from specdec.cli.streams import report
from specdec.client import Client, GenerateOptions, GenerationStream, Message
from specdec.contract.errors import RequestCancelledError, SpecdecError


def read_line() -> str | None:
    """Return a line of the user; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            report("\n(/exit or Ctrl-D leaves)")


@contextmanager
def ctrl_c_cancels(stream: GenerationStream) -> Iterator[None]:
    """Make Ctrl-C cancel the answer during the block, which raises KeyboardInterrupt where it is read.

    Python alone would raise it anywhere, also while gRPC waits for a lock, which does not survive it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    pressed = threading.Event()

    def cancel(_signum: int, _frame: FrameType | None) -> None:
        pressed.set()
        # The handler may have interrupted a holder of the call's lock: another thread waits for it.
        threading.Thread(target=stream.cancel, daemon=True).start()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    except RequestCancelledError as error:
        if pressed.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """The turns of a chat and what the user may type in it.

    Args:
        client: of the gateway that answers.
        options: of every answer.
        opening: turns that a reset keeps.
        no_color: no colours.
    """

    def __init__(
        self, client: Client, options: GenerateOptions, opening: list[Message], no_color: bool
    ) -> None:
        self.history = list(opening)
        self.num_failed = 0
        """Answers that ended with an error."""
        self._client = client
        self._options = options
        self._opening = opening
        self._no_color = no_color

    def run(self, read_line: Callable[[], str | None]) -> None:
        """Answer line by line until the end of input or /exit."""
        while (line := read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/help":
                    report("/reset forgets the talk, /exit leaves; Ctrl-C stops an answer.")
                case "/reset":
                    self.history = list(self._opening)
                    report("The conversation is forgotten.")
                case command if command.startswith("/"):
                    report(f"There is no {command.split()[0]}; /reset forgets the talk, /exit leaves.")
                case _:
                    self._answer(line)

    def _answer(self, line: str) -> None:
        turns = [*self.history, Message("user", line)]
        printer = AnswerPrinter(console(self._no_color))
        texts: list[str] = []
        try:
            with self._client.stream(turns, self._options) as stream, ctrl_c_cancels(stream):
                for token in stream:
                    printer.add(token)
                    texts.append(token.text)
            printer.end()
            print_closing_line(stream.result, self._no_color)
        except KeyboardInterrupt:
            # What was said stays said: the user may want to go on from there.
            printer.end()
            report("(stopped)")
        except SpecdecError as error:
            printer.end()
            report(describe_error(error))
            if error.reason == "PROMPT_TOO_LONG" and self.history != self._opening:
                report("The conversation fills the model's context: /reset forgets it.")
            self.num_failed += 1
            return
        self.history = [*turns, Message("assistant", "".join(texts))]
