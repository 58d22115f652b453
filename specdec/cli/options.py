"""Command-line options that the client commands share, and the request options made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from specdec.cli.files import read_text
from specdec.cli.numbers import integers, numbers
from specdec.client import DEFAULT_TIMEOUT_S, GATEWAY_VARIABLE, GenerateOptions, OutputFormat
from specdec.contract.sampling import SamplingParams

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


_CONNECTION = (
    click.option(
        "--gateway",
        metavar="ADDRESS",
        default="",
        help=f"Gateway, HOST:PORT or a gRPC URI.  [default: ${GATEWAY_VARIABLE}, else the one that "
        "`specdec up` started]",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        metavar="SECONDS",
        type=numbers(0, above=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="Give up on an answer after this many seconds.",
    ),
)

_METHOD = click.option(
    "--method",
    default="",
    help="Drafter that `specdec info` lists, several joined by + (dflash+ngram), `auto` for what pays best "
    "round by round, or `none` for plain decoding.  [default: the gateway's]",
)

_LENGTH = (
    click.option(
        "-k",
        "--draft-depth",
        metavar="K",
        type=integers(0),
        help="Tokens to draft in a row in each round; 0 is plain decoding.  [default: the gateway chooses "
        "round by round what pays]",
    ),
    click.option(
        "--draft-nodes",
        metavar="N",
        type=integers(0),
        default=0,
        help="Most tokens of a round's draft tree, all drafters together.  [default: with -k one chain per "
        "drafter, without it the gateway chooses]",
    ),
    click.option(
        "--min-draft-confidence",
        metavar="P",
        type=numbers(0, 1),
        default=0.0,
        help="End a draft before the first token that its drafter gives less than this probability.  "
        "[default: 0, off]",
    ),
    click.option(
        "-n",
        "--max-new-tokens",
        metavar="N",
        type=integers(1),
        help="Most tokens of the answer.  [default: the gateway's]",
    ),
    click.option(
        "--stop",
        metavar="TEXT",
        multiple=True,
        help="End the answer before this text; may be given several times. A special token such as "
        "'<|im_end|>' ends it as well.",
    ),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        metavar="ID",
        type=integers(0),
        multiple=True,
        help="End the answer with this token; may be given several times.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's own end token."),
)


def _sampling_option(*names: str, default: float, help: str) -> Callable[[CommandT], CommandT]:
    """Make an option whose type is that of its default."""
    return click.option(*names, type=type(default), default=default, show_default=True, help=help)


_SAMPLING = (
    _sampling_option(
        "-t",
        "--temperature",
        default=0.0,
        help="Randomness of the picks; 0 always takes the most probable token.",
    ),
    _sampling_option(
        "--top-p",
        default=1.0,
        help="Pick among the most probable tokens that together reach this probability, in (0, 1].",
    ),
    _sampling_option("--top-k", default=0, help="Pick among the K most probable tokens; 0: all."),
    _sampling_option(
        "--min-p",
        default=0.0,
        help="Drop tokens less probable than this times the most probable one, in [0, 1].",
    ),
    _sampling_option(
        "--repetition-penalty",
        default=1.0,
        help="Values above 1 disfavour tokens of the prompt and the answer.",
    ),
    _sampling_option(
        "--presence-penalty", default=0.0, help="Positive values disfavour tokens of the answer, in [-2, 2]."
    ),
    _sampling_option("--frequency-penalty", default=0.0, help="The same, once per occurrence, in [-2, 2]."),
    click.option(
        "--seed",
        metavar="N",
        type=integers(0, 2**64 - 1),
        help="Seed of random picks: the same request and seed give the same answer with every method.  "
        "[default: the gateway draws one for each request]",
    ),
)

_FORMAT = (
    click.option(
        "--json-schema",
        metavar="FILE|JSON",
        help="Answer with JSON that is valid under this JSON Schema, a file or the JSON itself.",
    ),
    click.option("--json-object", is_flag=True, help="Answer with a JSON object, whatever is in it."),
    click.option(
        "--regex",
        metavar="PATTERN",
        help="Answer with a text that this regular expression matches as a whole.",
    ),
    click.option(
        "--choice",
        "choices",
        metavar="TEXT",
        multiple=True,
        help="Answer with one of the texts that are given so; to be given several times.",
    ),
)

RAW = click.option(
    "--raw",
    is_flag=True,
    help="Continue the prompt as it is, without the chat template; special tokens in it stay such.",
)

NO_COLOR = click.option(
    "--no-color", is_flag=True, help="Show no colours in the terminal; $NO_COLOR does the same."
)


def connection_options(command: CommandT) -> Callable[..., Any]:
    """Add --gateway and --timeout; the command gets `gateway` and `timeout_s`."""
    return _apply(_CONNECTION, command)


def generation_options(*, with_method: bool = True) -> Callable[[CommandT], Callable[..., Any]]:
    """Add the options of a generation; the command gets one `options: GenerateOptions`."""

    def decorate(command: CommandT) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(
            *,
            draft_depth: int | None,
            draft_nodes: int,
            min_draft_confidence: float,
            max_new_tokens: int | None,
            stop: tuple[str, ...],
            stop_token_ids: tuple[int, ...],
            ignore_eos: bool,
            method: str = "",
            **rest: Any,
        ) -> Any:
            names = SamplingParams.__dataclass_fields__.keys() & rest.keys()
            options = GenerateOptions(
                method=method,
                draft_depth=draft_depth,
                draft_nodes=draft_nodes,
                min_draft_confidence=min_draft_confidence,
                max_new_tokens=max_new_tokens,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                sampling=SamplingParams(**{name: rest.pop(name) for name in names}),
            )
            return command(options=options, **rest)

        return _apply((*((_METHOD,) if with_method else ()), *_LENGTH, *_SAMPLING), wrapper)

    return decorate


def format_options(command: CommandT) -> Callable[..., Any]:
    """Add the options of an output format; the command gets one `output_format: OutputFormat | None`."""

    @functools.wraps(command)
    def wrapper(
        *,
        json_schema: str | None,
        json_object: bool,
        regex: str | None,
        choices: tuple[str, ...],
        **rest: Any,
    ) -> Any:
        given = [json_schema is not None, json_object, regex is not None, bool(choices)]
        if sum(given) > 1:
            raise click.UsageError("An answer has one format: give one kind of its options only.")
        output_format = OutputFormat(
            json_schema=None if json_schema is None else _json_schema(json_schema),
            regex=regex,
            choices=choices or None,
            json_object=json_object,
        )
        return command(output_format=output_format if any(given) else None, **rest)

    return _apply(_FORMAT, wrapper)


def _json_schema(text_or_file: str) -> str:
    is_text = text_or_file.lstrip().startswith("{")
    return text_or_file if is_text else read_text(Path(text_or_file), "The JSON Schema")


def _apply(options: tuple[Callable[[Any], Any], ...], command: Callable[..., Any]) -> Callable[..., Any]:
    # Help lists options in the order of application, last first.
    for option in reversed(options):
        command = option(command)
    return command
