"""The command line against a scripted gateway on a real server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from drafter_service.cli import main as drafter_main
from gateway.cli import main as gateway_main
from specdec.cli.chat import Conversation
from specdec.cli.main import main
from specdec.cli.render import AnswerPrinter, agreement, fallback_note
from specdec.client import Client, GenerateOptions, Message, Token
from specdec.client.generation import Generation, ProposerStats, Speculation, Timing, Usage
from specdec.local import up
from specdec.local.state_file import SystemState, write_state
from specdec.v1 import common_pb2
from tests.unit.scripted_gateway import (
    Responses,
    ScriptedGateway,
    chunk,
    finished,
    hang,
    refuse,
    refuse_as_too_long,
    serving,
    started,
    token,
)
from verifier_service.cli import main as verifier_main

COMMANDS = ["bench", "chat", "compare", "doctor", "down", "generate", "info", "up"]


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with serving() as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a state directory of the test's own, in which no system runs."""
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("SPECDEC_GATEWAY", raising=False)
    return tmp_path / "state"


def run(*arguments: str, gateway: ScriptedGateway | None = None, stdin: str | bytes | None = None) -> Result:
    address = ("--gateway", gateway.address) if gateway else ()
    return CliRunner().invoke(main, [*arguments, *address], input=stdin)


def test_generate_prints_the_text_and_nothing_else(gateway: ScriptedGateway) -> None:
    result = run("generate", "Hi", gateway=gateway)
    assert (result.exit_code, result.stdout) == (0, "Hello, world!\n")
    assert result.stderr == (
        "5 tokens, 1250.0 tokens/s | method ngram | acceptance length 2.50 | 2 rounds | TTFT 2 ms\n"
    )


def test_a_sampled_answer_says_which_seed_gives_it_again(gateway: ScriptedGateway) -> None:
    result = run("generate", "Hi", "-t", "0.5", gateway=gateway)
    assert result.stderr.endswith(" | TTFT 2 ms | seed 7\n")


def test_an_answer_that_breaks_off_says_which_request_it_was(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    result = run("generate", "Hi", "--timeout", "0.5", gateway=gateway)
    assert result.exit_code == 1
    assert result.stderr.endswith(" (request request-1)\n")


def test_generate_json_is_one_object(gateway: ScriptedGateway) -> None:
    result = run("generate", "Hi", "--json", gateway=gateway)
    answer = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(answer) == {
        *("text", "token_ids", "finish_reason", "usage", "timing", "speculation"),
        *("request_id", "trace_id", "model_id", "seed", "num_failovers"),
    }
    assert set(answer["speculation"]) == {
        *("method", "num_rounds", "num_draft_tokens", "num_accepted_tokens", "mean_acceptance_length"),
        *("acceptance_histogram", "acceptance_by_depth", "draft_tokens_per_token"),
        *("num_draft_tokens_per_position", "num_accepted_tokens_per_position"),
        *("draft_ms", "verify_ms", "transport_ms", "gateway_ms"),
    }
    assert answer["token_ids"] == [11, 12, 13, 14, 2]


def test_generate_json_shows_log_probabilities(gateway: ScriptedGateway) -> None:
    answer = json.loads(run("generate", "Hi", "--json", "--logprobs", "2", gateway=gateway).stdout)
    assert len(answer["logprobs"]) == 5
    assert gateway.requests[0].num_top_logprobs == 2


def test_every_option_reaches_the_gateway(gateway: ScriptedGateway) -> None:
    options = (
        *("--method", "none", "-k", "3", "-n", "9", "--stop", "a", "--stop", "b", "--ignore-eos"),
        *("--stop-token-id", "11", "--stop-token-id", "12"),
        *("-t", "0.5", "--top-p", "0.75", "--top-k", "40", "--min-p", "0.25", "--seed", "7"),
        *("--repetition-penalty", "1.5", "--presence-penalty", "0.5", "--frequency-penalty", "-0.5"),
        *("--system", "Be brief."),
    )
    assert run("generate", "Hi", *options, gateway=gateway).exit_code == 0
    request = gateway.requests[0]
    sampling = request.sampling
    assert [(turn.role, turn.content) for turn in request.chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    assert (request.method, request.draft_depth, request.max_new_tokens) == ("none", 3, 9)
    assert (list(request.stop_strings), request.ignore_eos) == (["a", "b"], True)
    assert list(request.stop_token_ids) == [11, 12]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 40, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, 0.5)
    assert (sampling.frequency_penalty, sampling.seed) == (-0.5, 7)


def test_prompt_from_standard_input_raw(gateway: ScriptedGateway) -> None:
    run("generate", "-", "--raw", gateway=gateway, stdin="päivää\n")
    assert gateway.requests[0].text == "päivää\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "a\udcff"), "prompt is not valid Unicode"),
        (("generate", "-"), "prompt is not valid Unicode"),
        (("generate", "Hi", "-k", "-1"), "-1 is not in the range 0<=x<=2147483647"),
        (("generate", "Hi", "-n", "-5"), "-5 is not in the range 1<=x<=2147483647"),
        (("generate", "Hi", "--seed", "-1"), "-1 is not in the range 0<=x<=18446744073709551615"),
        (
            ("generate", "Hi", "-n", "4294967296"),
            "4294967296 is not in the range 1<=x<=2147483647",
        ),
        (("generate", "Hi", "-t", "nan"), "temperature is nan"),
        (("generate", "Hi", "--top-p", "0"), "top_p is 0.0"),
        (("generate", "Hi", "--timeout", "0"), "0.0 is not in the range 0<x<=2147483647"),
        (("generate", "Hi", "--logprobs", "1"), "--logprobs needs --json"),
        (("generate", "Hi", "--raw", "--system", "x"), "--system needs the chat template"),
        (("compare", "Hi", "--methods", ","), "--methods is empty"),
        (("generate", "Hi", "--regex", "a", "--choice", "b"), "An answer has one format"),
        (
            ("generate", "Hi", "--json-schema", "/nowhere.json"),
            "Schema /nowhere.json cannot be read",
        ),
        (("generate", "Hi", "--json-schema", "{"), "json_schema is not JSON"),
        (("generate", "Hi", "--regex", ""), "regex is ''"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(
    gateway: ScriptedGateway, arguments: tuple[str, ...], said: str
) -> None:
    result = run(*arguments, gateway=gateway, stdin=b"\xff\xfe")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert gateway.requests == []


@pytest.mark.parametrize("command", [("generate", "Hi"), ("compare", "Hi", "--methods", "none")])
def test_an_answer_may_have_a_format(
    command: tuple[str, ...], gateway: ScriptedGateway, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "null"}')
    for arguments, field, value in (
        (("--json-schema", str(tmp_path / "schema.json")), "json_schema", '{"type": "null"}'),
        (("--json-schema", ' {"type": "null"}'), "json_schema", ' {"type": "null"}'),
        (("--json-object",), "json_object", common_pb2.JsonObject()),
        (("--regex", "a+"), "regex", "a+"),
        (("--choice", "a", "--choice", "b"), "choices", common_pb2.Choices(texts=["a", "b"])),
    ):
        assert run(*command, *arguments, gateway=gateway).exit_code == 0
        message = gateway.requests[-1].output_format
        assert (message.WhichOneof("format"), getattr(message, field)) == (field, value)
    run(*command, gateway=gateway)
    assert not gateway.requests[-1].HasField("output_format")


def test_server_errors_are_one_line_and_exit_code_1(gateway: ScriptedGateway) -> None:
    gateway.script = refuse
    result = run("generate", "Hi", gateway=gateway)
    assert result.exit_code == 1
    assert result.stderr == "error: No slot is free. Try again in 1.5 s.\n"


def test_the_deadline_is_an_error_after_the_text_so_far(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    result = run("generate", "Hi", "--timeout", "0.5", gateway=gateway)
    assert (result.exit_code, result.stdout) == (1, "Hello\n")
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", [("generate", "Hi"), ("info",), ("compare", "Hi"), ("chat",)])
def test_without_a_gateway_the_error_says_what_to_do(command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: No gateway is running here. Start one with `specdec up`")


def test_commands_find_the_running_system(gateway: ScriptedGateway) -> None:
    me = psutil.Process()
    state = SystemState(me.pid, me.create_time(), gateway.address, "v:1", "d:1", {}, "/logs")
    write_state(state)
    assert run("generate", "Hi").stdout == "Hello, world!\n"
    result = run("up")
    assert result.exit_code == 1
    assert f"runs already; its gateway is {gateway.address}" in result.stderr
    # Its state directory is none of the usual: without it `specdec down` would find nothing.
    assert f"SPECDEC_STATE_DIR={os.environ['SPECDEC_STATE_DIR']} specdec down" in result.stderr


def test_drafters_lost_together_are_noted_once() -> None:
    proposers = tuple(
        ProposerStats(name, 5, 1, 1, num_fallback_rounds=count, fallback_reason=reason)
        for name, count, reason in (("mtp", 3, "gone"), ("a", 0, ""), ("ngram", 4, "gone"), ("b", 1, "late"))
    )
    speculation = Speculation("mtp+a+ngram+b", 9, 15, 3, proposers=proposers)
    answer = Generation("", (), "length", Usage(1, 1), Timing(0.0, 0.0, 0.0), speculation, "", "tiny")
    assert fallback_note(answer) == "of 9 rounds 3 without mtp, 4 without ngram: gone; 1 without b: late"


def test_a_drafter_that_is_never_right_is_noted_though_it_was_asked() -> None:
    proposers = (
        ProposerStats("mtp", 5, 0, 0, fallback_reason="wrong"),
        ProposerStats("a", 5, 1, 1),
        ProposerStats("b", 5, 1, 1, num_fallback_rounds=2, fallback_reason="late"),
    )
    alone = Speculation("mtp", 9, 15, 0, fallback_reason="wrong")
    merged = Speculation("mtp+a", 9, 15, 3, proposers=proposers[:2])
    late = Speculation("mtp+a+b", 9, 15, 3, proposers=proposers)
    notes = [
        fallback_note(Generation("", (), "length", Usage(1, 1), Timing(0.0, 0.0, 0.0), told, "", "tiny"))
        for told in (alone, merged, late)
    ]
    assert notes == ["wrong", "mtp: wrong", "of 9 rounds 2 without b: late; mtp: wrong"]


def test_a_lost_drafter_is_noted(gateway: ScriptedGateway) -> None:
    def without_drafter(*_: object) -> Responses:
        yield started()
        yield chunk(token(1, "fine\n"))
        yield finished(fallback_reason="drafter at host:2 is gone")

    gateway.script = without_drafter
    result = run("generate", "Hi", gateway=gateway)
    assert result.stdout == "fine\n"
    assert result.stderr.endswith(
        "note: 1 of 2 rounds went without a draft, the commonest reason: drafter at host:2 is gone\n"
    )


def terminal_output(tokens: list[Token], *, no_color: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", no_color=no_color)
    printer = AnswerPrinter(console)
    for item in tokens:
        printer.add(item)
    printer.end()
    return file.getvalue()


def test_a_terminal_shows_where_tokens_come_from() -> None:
    tokens = [Token(1, "Hello", False), Token(2, ", ", True), Token(3, "world", False)]
    assert terminal_output(tokens) == "Hello\x1b[32m, \x1b[0mworld\n"
    assert terminal_output(tokens, no_color=True) == "Hello, world\n"


def test_a_model_cannot_control_the_terminal() -> None:
    assert terminal_output([Token(1, "a\x1b[2Jb\tc\n", False)]) == "a\N{REPLACEMENT CHARACTER}[2Jb\tc\n"


def test_a_pipe_gets_the_text_as_it_is(gateway: ScriptedGateway) -> None:
    text = "long " * 100 + "[bold]\t\x1b[0m end\n"

    def verbatim(*_: object) -> Responses:
        yield started()
        yield chunk(token(1, text))
        yield finished()

    gateway.script = verbatim
    assert run("generate", "Hi", gateway=gateway).stdout == text


def test_info_shows_models_methods_and_replicas(gateway: ScriptedGateway) -> None:
    output = run("info", gateway=gateway).stdout
    for shown in ("tiny", "none, ngram", "host:1", "ready", "1 of 8", "tiny (0123abcd),"):
        assert shown in output
    info = json.loads(run("info", "--json", gateway=gateway).stdout)
    assert info["methods"] == ["none", "ngram"]
    assert info["drafters"][1] == {
        "uri": "host:3",
        "ready": False,
        "num_sessions": 0,
        "reason": "connection refused",
        "info": None,
    }


def test_compare_runs_each_method_after_a_warm_up(gateway: ScriptedGateway) -> None:
    result = run("compare", "Hi", "--methods", "none, ngram", "-k", "4", "-n", "20", gateway=gateway)
    assert result.exit_code == 0
    assert [(request.method, request.max_new_tokens) for request in gateway.requests] == [
        ("none", 4),
        ("ngram", 4),
        ("none", 20),
        ("ngram", 20),
    ]
    assert not gateway.requests[2].HasField("draft_depth")
    assert gateway.requests[3].draft_depth == 4
    for shown in ("Compared with none", "ngram", "1.00x", "2.50", "same"):
        assert shown in result.stdout
    first, second = result.stderr.splitlines()
    assert first.startswith("none: 5 tokens, 1250.0 tokens/s")
    assert second.startswith("ngram: 5 tokens, 1250.0 tokens/s")


def test_compare_shows_the_answers_as_they_come_in_a_terminal(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = run("compare", "Hi", "--methods", "none,ngram", gateway=gateway).stdout
    monkeypatch.delenv("FORCE_COLOR")
    answer = run("generate", "Hi", gateway=gateway).stdout.split()[0].strip(",")
    assert shown.count(answer) == 2
    assert answer not in run("compare", "Hi", "--methods", "none,ngram", gateway=gateway).stdout
    assert shown.index("none") < shown.index(answer) < shown.index("ngram") < shown.rindex(answer)
    assert shown.rindex(answer) < shown.index("Compared with none")


def test_agreement_names_the_first_token_that_differs(gateway: ScriptedGateway) -> None:
    def answers(*token_ids: int) -> Responses:
        yield started()
        yield chunk(*(token(token_id, "") for token_id in token_ids))
        yield finished()

    scripts = {"a": (1, 2, 3), "b": (1, 5, 3), "c": (1, 2)}
    gateway.script = lambda _gateway, request, _context: answers(*scripts[request.method])
    with Client(gateway.address) as client:
        a, b, c = (client.generate("Hi", GenerateOptions(method=name)) for name in scripts)
    assert (agreement(a, a), agreement(a, b), agreement(a, c)) == (
        "same",
        "differs from token 1",
        "differs from token 2",
    )


def test_chat_keeps_the_history_until_reset(gateway: ScriptedGateway) -> None:
    lines = "Hi\n\nAnd you?\n/nonsense\n/reset\nAgain\n/exit\nnever asked\n"
    result = run("chat", "--system", "Be brief.", gateway=gateway, stdin=lines)
    assert result.exit_code == 0
    contents = [[turn.content for turn in request.chat.messages] for request in gateway.requests]
    assert contents == [
        ["Be brief.", "Hi"],
        ["Be brief.", "Hi", "Hello, world!", "And you?"],
        ["Be brief.", "Again"],
    ]
    assert result.stdout == "Hello, world!\n" * 3
    assert "There is no /nonsense" in result.stderr


def test_chat_survives_an_error_and_forgets_the_turn(gateway: ScriptedGateway) -> None:
    with Client(gateway.address) as client:
        conversation = Conversation(client, GenerateOptions(), [], no_color=True)
        gateway.script = refuse
        lines = iter(["Hi", None])
        conversation.run(lambda: next(lines))
    assert conversation.history == []
    assert conversation.num_failed == 1


@pytest.mark.parametrize("num_turns", [0, 1])
def test_a_chat_that_fills_the_context_says_how_to_go_on(
    num_turns: int, gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(gateway.address) as client:
        conversation = Conversation(client, GenerateOptions(), [], no_color=True)
        conversation.run(iter(["Hi"] * num_turns + [None]).__next__)
        gateway.script = refuse_as_too_long
        conversation.run(iter(["Hi", None]).__next__)
    assert ("/reset forgets it" in capsys.readouterr().err) == bool(num_turns)


def test_a_piped_chat_that_failed_says_so(gateway: ScriptedGateway) -> None:
    gateway.script = refuse
    result = CliRunner().invoke(main, ["chat", "--gateway", gateway.address], input="Hi\n")
    assert result.exit_code == 1


@pytest.fixture
def children_heed_ctrl_c() -> Iterator[None]:
    """Restore the signal's default: a shell starts its background jobs with the signal ignored, and children
    inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("children_heed_ctrl_c")
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    command = [sys.executable, "-m", "specdec", "chat", "--gateway", gateway.address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("Hi\n")
        chat.stdin.flush()
        assert chat.stdout.read(5) == "Hello"
        chat.send_signal(signal.SIGINT)
        assert gateway.ended.wait(10)
        chat.stdin.write("/exit\n")
        _, errors = chat.communicate(timeout=20)
    assert (chat.returncode, errors) == (0, "(stopped)\n")


@pytest.mark.usefixtures("children_heed_ctrl_c")
def test_ctrl_c_ends_an_answer_in_order(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    command = [sys.executable, "-m", "specdec", "generate", "Hi", "--gateway", gateway.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as answer:
        assert answer.stdout is not None
        assert answer.stdout.read(5) == "Hello"
        answer.send_signal(signal.SIGINT)
        assert gateway.ended.wait(10)
        _, errors = answer.communicate(timeout=20)
    assert (answer.returncode, errors.strip()) == (1, "Aborted!")


def test_a_stopped_answer_stays_in_the_history(gateway: ScriptedGateway) -> None:
    class Impatient(Client):
        """Presses Ctrl-C after the first token."""

        def stream(self, *arguments: object, **options: object):  # type: ignore[no-untyped-def]
            stream = super().stream(*arguments, **options)  # type: ignore[arg-type]
            first = next(stream)

            def tokens() -> Iterator[Token]:
                yield first
                raise KeyboardInterrupt

            stream._tokens = tokens()
            return stream

    with Impatient(gateway.address) as client:
        conversation = Conversation(client, GenerateOptions(), [], no_color=True)
        lines = iter(["Hi", None])
        conversation.run(lambda: next(lines))
    assert conversation.history == [Message("user", "Hi"), Message("assistant", "Hello")]


def test_down_says_so_when_nothing_runs() -> None:
    result = run("down")
    assert (result.exit_code, result.stderr) == (0, "Nothing is running.\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "1025"),
        ("--threads", "-1"),
        ("--timeout", "86401"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--timeout", "0"),
        ("--kv-cache-mib", "nan"),
        ("--kv-cache-mib", "1e300"),
        ("--port", "65536"),
    ],
)
def test_up_has_bounds_for_every_number(option: str, value: str) -> None:
    result = run("up", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr
    assert "is not in the range" in " ".join(result.stderr.split())


def test_help_shows_the_ranges_of_numbers() -> None:
    result = run("generate", "-h")
    assert (result.exit_code, result.stderr) == (0, ""), result.exc_info
    shown = " ".join(result.stdout.split())
    for numbers in (
        *("[0<=x<=2147483647]", "[1<=x<=2147483647]", "0<=x<=18446744073709551615"),
        *("0<=x<=20", "0<x<=2147483647"),
    ):
        assert numbers in shown


@pytest.mark.parametrize("service", [gateway_main, verifier_main, drafter_main])
def test_services_take_the_short_option_for_help(service: click.Command) -> None:
    result = CliRunner().invoke(service, ["-h"])
    assert result.exit_code == 0
    assert "Example:" in result.output


@pytest.mark.parametrize("command", [("up",), ("up", "--detach", "--model", "none/none")])
@pytest.mark.parametrize("inside", ["", "logs", "lock"])
def test_a_state_directory_that_cannot_be_used_is_an_error(
    state: Path, command: tuple[str, ...], inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is where a directory has to be, or the other way round."""
    if inside == "lock":
        (state / "lock").mkdir(parents=True)
        (state / "starting").mkdir()
    else:
        (state / inside).parent.mkdir(exist_ok=True, parents=True)
        (state / inside).touch()
    monkeypatch.setattr(up, "prepare_models", lambda *_: None)
    result = run(*command)
    assert result.exit_code == 1, result.output
    assert f"error: {state / inside}".rstrip("/") in result.stderr or "starting, where" in result.stderr
    assert "set SPECDEC_STATE_DIR to a directory" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_help_teaches_and_is_quick() -> None:
    start = time.monotonic()
    output = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "specdec", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - start < 5
    assert "specdec up --detach" in output.stdout
    for name in COMMANDS:
        assert f"\n  {name}" in output.stdout
    for heavy in ("torch", "transformers", "specdec.bench"):
        assert f" {heavy}\n" not in output.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_a_token_needs_a_name() -> None:
    result = CliRunner().invoke(main, ["token", " "])
    assert result.exit_code == 2
    assert "give the caller a name" in result.stderr
    assert result.stdout == ""
