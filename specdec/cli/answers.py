"""Commands that ask for answers: one, one by each method, a conversation."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from specdec.cli.chat import Conversation, ctrl_c_cancels, read_line
from specdec.cli.numbers import integers
from specdec.cli.options import NO_COLOR, RAW, connection_options, format_options, generation_options
from specdec.cli.render import (
    AnswerPrinter,
    closing_line,
    comparison_table,
    console,
    fallback_note,
    print_closing_line,
)
from specdec.cli.streams import read_input, report, show_json
from specdec.client import Client, GenerateOptions, Generation, Message, OutputFormat, Prompt
from specdec.contract.methods import PLAIN
from specdec.contract.sampling import MAX_TOP_LOGPROBS, with_seed

WARM_UP_TOKENS = 4
"""Tokens of the untimed run before a comparison, so that no method pays for cold caches."""


@click.command()
@click.argument("prompt")
@generation_options()
@format_options
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@RAW
@click.option(
    "--logprobs",
    metavar="N",
    type=integers(0, MAX_TOP_LOGPROBS),
    help="With --json: log probabilities, and the N best alternatives.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@connection_options
@NO_COLOR
def generate(
    prompt: str,
    options: GenerateOptions,
    output_format: OutputFormat | None,
    system: str | None,
    raw: bool,
    logprobs: int | None,
    as_json: bool,
    gateway: str,
    timeout_s: float,
    no_color: bool,
) -> None:
    """Answer PROMPT; - reads it from standard input.

    In a terminal the text comes as it is made, tokens the drafter guessed in green. Standard output carries
    the answer only; speed and acceptance follow on standard error.

    \b
    Examples:
      specdec generate "Explain tides to a child." -n 100
      specdec generate "Tell a story." -t 0.8 --top-p 0.95 --seed 7
      specdec generate --raw "def fibonacci(n):" --method ngram -k 8 --json
      specdec generate - < question.txt
      specdec generate "Is water wet?" --choice yes --choice no
      specdec generate "Invent a person." --json-schema person.json
    """
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json, which shows them.")
    if system is not None and raw:
        raise click.UsageError("--system needs the chat template, which --raw leaves out.")
    if prompt == "-":
        prompt = read_input()
    if not prompt.strip():
        raise click.UsageError("The prompt is empty.")
    options = replace(options, output_format=output_format, raw=raw, num_top_logprobs=logprobs)
    full_prompt: Prompt = prompt if system is None else [Message("system", system), Message("user", prompt)]
    with Client(gateway, timeout_s=timeout_s) as client:
        if as_json:
            answer = client.generate(full_prompt, options)
            show_json(answer.to_json())
        else:
            _stream_answer(client, full_prompt, options, no_color)


def _stream_answer(client: Client, prompt: Prompt, options: GenerateOptions, no_color: bool) -> Generation:
    """Print an answer as it is made, and the line that closes it."""
    printer = AnswerPrinter(console(no_color))
    with client.stream(prompt, options) as stream:
        try:
            with ctrl_c_cancels(stream):
                for token in stream:
                    printer.add(token)
        finally:
            printer.end()
        print_closing_line(stream.result, no_color)
        return stream.result


@click.command()
@click.argument("prompt")
@click.option(
    "--methods",
    default="none,ngram",
    show_default=True,
    help="Methods to run one after the other, separated by commas.",
)
@generation_options(with_method=False)
@format_options
@RAW
@connection_options
def compare(
    prompt: str,
    methods: str,
    options: GenerateOptions,
    output_format: OutputFormat | None,
    raw: bool,
    gateway: str,
    timeout_s: float,
) -> None:
    """Answer PROMPT with each method in turn and compare speed and text.

    In a terminal the answers come as they are made, tokens the drafter guessed in green; a table ends them.
    Elsewhere only the table is printed, and on standard error a line for each method when it is done.
    Speedup is the time per output token of `none` (or of the first method) over that of the method. One
    prompt is one sample; `specdec bench run` measures many.

    \b
    Example:
      specdec compare "Repeat this list backwards: a b c d e f g" --methods none,ngram -n 100
      specdec compare "Design a hospital management system." --methods none,mtp,dflash -n 2048
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--methods is empty; name at least one, as in --methods none,ngram.")
    options = replace(options, output_format=output_format, raw=raw, sampling=with_seed(options.sampling))
    with Client(gateway, timeout_s=timeout_s) as client:
        for name in names:
            # A method's first use maps weights and packs heads; and a mistyped name shows before any answer.
            client.generate(prompt, _for_method(replace(options, max_new_tokens=WARM_UP_TOKENS), name))
        answers = [(name, _answer_of(name, client, prompt, options)) for name in names]
    console().print(comparison_table(answers))
    for name, answer in answers:
        if note := fallback_note(answer):
            report(f"{name}: {note}")


def _answer_of(method: str, client: Client, prompt: str, options: GenerateOptions) -> Generation:
    """Return the answer by one method, shown live where a terminal is there to watch it in."""
    options, out = _for_method(options, method), console()
    if not out.is_terminal:
        answer = client.generate(prompt, options)
        report(f"{method}: {closing_line(answer)}")
        return answer
    out.rule(method)
    return _stream_answer(client, prompt, options, no_color=False)


def _for_method(options: GenerateOptions, method: str) -> GenerateOptions:
    if method == PLAIN:
        options = replace(options, draft_depth=None, draft_nodes=0)
    return replace(options, method=method)


@click.command()
@generation_options()
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@connection_options
@NO_COLOR
def chat(
    options: GenerateOptions, system: str | None, gateway: str, timeout_s: float, no_color: bool
) -> None:
    """Talk with the model, turn by turn.

    Ctrl-C stops the answer under way; /reset forgets the conversation; /exit or Ctrl-D leaves.
    """
    opening = [] if system is None else [Message("system", system)]
    with Client(gateway, timeout_s=timeout_s) as client:
        conversation = Conversation(client, options, opening, no_color)
        conversation.run(read_line)
    # Somebody at a terminal has seen it, and may have gone on; a script has not.
    if conversation.num_failed and not sys.stdin.isatty():
        raise click.exceptions.Exit(1)
