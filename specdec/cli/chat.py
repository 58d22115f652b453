"""`specdec chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from specdec.cli.groups import describe_error
from specdec.cli.render import AnswerPrinter, console, print_closing_line, report
from specdec.client import Client, GenerateOptions, Message
from specdec.contract.errors import SpecdecError


def read_line() -> str | None:
    """Return a line of the user; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            report("\n(/exit or Ctrl-D leaves)")


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
            with self._client.stream(turns, self._options) as stream:
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
            self.num_failed += 1
            return
        self.history = [*turns, Message("assistant", "".join(texts))]
