"""The command line as a process, on standard streams that lack characters, are full or are closed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.cli.main import main
from tests.unit.scripted_gateway import Responses, ScriptedGateway, chunk, finished, serving, started, token

TEXT = "naïve 你好 👋 a\u2028b"


def say_it(*_: object) -> Responses:
    yield started()
    yield chunk(token(1, TEXT))
    yield finished()


@pytest.fixture(scope="module")
def gateway() -> Iterator[ScriptedGateway]:
    with serving() as scripted:
        scripted.script = say_it
        yield scripted


@pytest.fixture(autouse=True)
def environment(gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPECDEC_GATEWAY", gateway.address)
    for name in ("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)


def shell(command: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run a line of the shell in which $S is the command line; return the exit code, output and messages."""
    program = f"{sys.executable} -P -m specdec"
    done = subprocess.run(
        ["bash", "-c", f"S='{program}'; {command}"], input=stdin, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"na\xefve \u4f60\u597d \U0001f44b a\u2028b"),
        ("latin-1", r"naïve \u4f60\u597d \U0001f44b a\u2028b"),
        ("utf-8", TEXT.encode().decode("latin-1")),
    ],
)
def test_what_an_output_encoding_lacks_is_escaped(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    code, output, messages = shell("$S generate Hi")
    assert (code, output) == (0, shown + "\n")
    assert messages.startswith("5 tokens, ")
    code, output, messages = shell("$S generate Hi --json")
    assert (code, messages) == (0, "")
    assert json.loads(output.encode("latin-1"))["text"] == TEXT


def test_a_locale_without_an_encoding_is_no_obstacle() -> None:
    code, output, _ = shell("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $S generate Hi")
    assert (code, output) == (0, r"na\xefve \u4f60\u597d \U0001f44b a\u2028b" + "\n")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("$S generate Hi > /dev/full", "No space left on device"),
        ("PYTHONUNBUFFERED=1 $S token me > /dev/full", "No space left on device"),
        ("$S --help > /dev/full", "No space left on device"),
        ("$S info >&-", "Bad file descriptor"),
        ("set -o pipefail; $S generate Hi --json | true", "Broken pipe"),
    ],
)
def test_an_answer_that_cannot_be_shown_is_an_error_of_one_line(command: str, reason: str) -> None:
    code, output, messages = shell(command)
    assert (code, output) == (1, "")
    *before, line = messages.splitlines()
    assert line.startswith(f"error: Standard output cannot be written ({reason})")
    assert all(earlier.startswith("The token of me") for earlier in before)


def test_a_chat_ends_where_its_answers_cannot_be_shown(gateway: ScriptedGateway) -> None:
    num_before = len(gateway.requests)
    code, _, messages = shell("$S chat > /dev/full", b"one\ntwo\n")
    assert (code, messages.count("\n")) == (1, 1)
    assert len(gateway.requests) - num_before == 1


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-"])
def test_messages_that_cannot_be_shown_cost_no_answer(redirection: str) -> None:
    code, output, _ = shell(f"$S generate Hi {redirection}")
    assert (code, output.encode("latin-1").decode()) == (0, TEXT + "\n")


@pytest.mark.parametrize("command", ["$S chat", "$S generate -"])
def test_input_is_utf_8_whatever_the_locale(command: str, gateway: ScriptedGateway) -> None:
    code, _, _ = shell(f"PYTHONIOENCODING=ascii {command}", "\ufeff你好".encode())
    assert code == 0
    assert gateway.requests[-1].chat.messages[0].content == "你好"


@pytest.mark.parametrize(("command", "exit_code"), [("$S chat <&-", 0), ("$S generate - <&-", 2)])
def test_a_closed_input_is_an_empty_one(command: str, exit_code: int) -> None:
    code, output, messages = shell(command)
    assert (code, output) == (exit_code, "")
    assert "Traceback" not in messages


@pytest.mark.parametrize(
    "command",
    [("bench", "run"), ("train", "ngram-lm"), ("train", "data", "--prompts", __file__)],
    ids=lambda command: command[1],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    command: tuple[str, ...], tmp_path: Path, gateway: ScriptedGateway
) -> None:
    (tmp_path / "file").touch()
    num_before = len(gateway.requests)
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "file" / "in" / "it")])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert f"{tmp_path / 'file'}" in result.stderr
    assert "Not a directory" in result.stderr
    assert len(gateway.requests) == num_before
