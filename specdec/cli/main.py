"""The command line: `specdec up`, `generate`, `chat`, `compare`, `info`, `bench`, `down`."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from dataclasses import asdict, replace
from typing import Any

import click

from specdec.cli.chat import Conversation, read_line
from specdec.cli.groups import ErrorGroup, LazyGroup
from specdec.cli.options import NO_COLOR, connection_options, generation_options
from specdec.cli.render import (
    AnswerPrinter,
    comparison_table,
    console,
    fallback_note,
    info_tables,
    print_closing_line,
    report,
)
from specdec.client import Client, GenerateOptions, Generation, Message, Prompt
from specdec.contract.methods import PLAIN
from specdec.contract.sampling import with_seed
from specdec.local.launcher import SystemConfig, default_drafters, prepare_models
from specdec.local.state_file import SystemState, how_to_stop, refuse_if_running
from specdec.local.up import run_detached, run_foreground, stop_running

WARM_UP_TOKENS = 4
"""Tokens of the untimed run before a comparison, so that no method pays for cold caches."""

DETACH_MARGIN_S = 30.0
"""Seconds a detached supervisor has beyond its own timeout, for starting up itself."""


@click.group(
    cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="specdec")
def main() -> None:
    """Speculative decoding as services: a drafter guesses, the target verifies, the text is the target's own.

    \b
    Start the three services here, ask something, look, stop:
      specdec up --detach
      specdec generate "Write a haiku about rivers."
      specdec compare "List the primes below 50." --methods none,ngram
      specdec info
      specdec down
    """


@main.command()
@click.option(
    "--model",
    default="default",
    show_default=True,
    help="Target model: folder, Hugging Face id, or `default`, the embedded SmolLM2-135M-Instruct.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Weight data type.",
)
@click.option("--device", default="cpu", show_default=True, help="Device of the target: cpu, cuda:0.")
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    help="Drafter to load, `ngram`, `ngram-lm[:MODEL]`, `mtp[:MODEL]`, `dflash[:MODEL]`, `causal-lm:MODEL`; "
    "may be repeated.  [default: ngram, and ngram-lm, mtp and dflash for the embedded model]",
)
@click.option(
    "--target-state",
    type=click.Choice(["auto", "handle", "stream"]),
    default="auto",
    show_default=True,
    help="How drafters read the target's hidden states and KV: mapped, or as a stream.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="CPU threads of verifier and drafter each; one is faster where other programs keep the cores busy.  "
    "[default: one per core]",
)
@click.option(
    "--kv-cache-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory of the target's KV, MiB.  [default: the verifier's]",
)
@click.option(
    "--port",
    "gateway_port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the gateway on 127.0.0.1.  [default: a free one]",
)
@click.option("--detach", is_flag=True, help="Return once all services are ready; `specdec down` stops them.")
@click.option(
    "--timeout",
    "ready_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds the services have to become ready.",
)
def up(detach: bool, **options: Any) -> None:
    """Start verifier, drafter and gateway on this machine.

    Services that die are started again; Ctrl-C stops all of them, once running answers
    have finished. The other commands find the gateway by themselves.

    \b
    Examples:
      specdec up
      specdec up --detach --port 50050
      specdec up --model ./my-model --drafter ngram --drafter causal-lm:./my-small-model
    """
    options["drafters"] = options["drafters"] or default_drafters(options["model"])
    # A verifier that dies comes back in its place, once it has loaded.
    config = SystemConfig(**options, extra_args={"gateway": ("--failover-wait-s", "60")})
    refuse_if_running()
    if detach:
        prepare_models(config, report)
        report("Starting verifier, drafter and gateway.")
        state = run_detached(_foreground_command(config), timeout_s=config.ready_timeout_s + DETACH_MARGIN_S)
        _announce(state, f"`{how_to_stop()}` stops it.")
    else:
        report("Starting verifier, drafter and gateway.")
        run_foreground(config, report=report, announce=lambda state: _announce(state, "Ctrl-C stops it."))


def _foreground_command(config: SystemConfig) -> list[str]:
    drafters = [argument for drafter in config.drafters for argument in ("--drafter", drafter)]
    kv_cache = () if config.kv_cache_mib is None else ("--kv-cache-mib", str(config.kv_cache_mib))
    # -P: a folder named specdec or gateway where the user stands is not meant.
    return [
        *(sys.executable, "-P", "-m", "specdec", "up"),
        *("--model", config.model, "--dtype", config.dtype, "--device", config.device, *drafters),
        *("--target-state", config.target_state, "--threads", str(config.threads), *kv_cache),
        *("--port", str(config.gateway_port), "--timeout", str(config.ready_timeout_s)),
    ]


def _announce(state: SystemState, hint: str) -> None:
    click.echo(f"gateway {state.gateway}  verifier {state.verifier}  drafter {state.drafter}")
    report(f"Ready. Logs are in {state.log_dir}. {hint}")


@main.command()
def down() -> None:
    """Stop what `specdec up` started; running answers may finish."""
    state = stop_running()
    report(
        "Nothing is running." if state is None else f"Stopped the system with its gateway on {state.gateway}."
    )


@main.command()
@click.argument("prompt")
@generation_options()
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option(
    "--logprobs", metavar="N", type=int, help="With --json: log probabilities, and the N best alternatives."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@connection_options
@NO_COLOR
def generate(
    prompt: str,
    options: GenerateOptions,
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
    """
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json, which shows them.")
    if system is not None and raw:
        raise click.UsageError("--system needs the chat template, which --raw leaves out.")
    if prompt == "-":
        # Undecodable bytes become lone surrogates, which the client refuses with a clear error.
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    if not prompt.strip():
        raise click.UsageError("The prompt is empty.")
    options = replace(options, raw=raw, num_top_logprobs=logprobs)
    full_prompt: Prompt = prompt if system is None else [Message("system", system), Message("user", prompt)]
    with Client(gateway, timeout_s=timeout_s) as client:
        if as_json:
            answer = client.generate(full_prompt, options)
            click.echo(json.dumps(answer.to_json(), ensure_ascii=False))
        else:
            _stream_answer(client, full_prompt, options, no_color)


def _stream_answer(client: Client, prompt: Prompt, options: GenerateOptions, no_color: bool) -> Generation:
    """Print an answer as it is made, and the line that closes it."""
    printer = AnswerPrinter(console(no_color))
    with client.stream(prompt, options) as stream:
        try:
            for token in stream:
                printer.add(token)
        finally:
            printer.end()
        print_closing_line(stream.result, no_color)
        return stream.result


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@connection_options
def info(as_json: bool, gateway: str, timeout_s: float) -> None:
    """Show the model, the methods, and the replicas with their load."""
    with Client(gateway, timeout_s=timeout_s) as client:
        system = client.info()
    if as_json:
        click.echo(json.dumps(asdict(system)))
        return
    for table in info_tables(system):
        console(no_color=False).print(table)


@main.command()
@click.argument("prompt")
@click.option(
    "--methods",
    default="none,ngram",
    show_default=True,
    help="Methods to run one after the other, separated by commas.",
)
@generation_options(with_method=False)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@connection_options
def compare(
    prompt: str, methods: str, options: GenerateOptions, raw: bool, gateway: str, timeout_s: float
) -> None:
    """Answer PROMPT with each method in turn and compare speed and text.

    In a terminal the answers come as they are made, tokens the drafter guessed in green; a table ends them.
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
    options = replace(options, raw=raw, sampling=with_seed(options.sampling))
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
    """The answer by one method, live where there is a terminal to watch it in."""
    options, out = _for_method(options, method), console()
    if not out.is_terminal:
        return client.generate(prompt, options)
    out.rule(method)
    return _stream_answer(client, prompt, options, no_color=False)


def _for_method(options: GenerateOptions, method: str) -> GenerateOptions:
    if method == PLAIN:
        options = replace(options, draft_depth=None, draft_nodes=0)
    return replace(options, method=method)


@main.command()
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


def _not_blank(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("give the caller a name: limits count by it.")
    return value


@main.command()
@click.argument("name", callback=_not_blank)
def token(name: str) -> None:
    """Make a bearer token for a gateway that is run with --auth-tokens FILE.

    The token is shown once, on the error output; the table that goes into FILE, on the output, holds its
    checksum only: specdec token alice >> tokens.toml
    """
    secret = secrets.token_urlsafe(32)
    click.echo(f"[[tokens]]\nname = {json.dumps(name)}")
    click.echo(f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"')
    click.echo("# max_concurrent_requests = 4\n# max_new_tokens = 1024\n# requests_per_minute = 60")
    click.echo("# expires = 2030-01-31T00:00:00Z\n")
    click.echo(f"The token of {name}, for SPECDEC_TOKEN: {secret}", err=True)


main.add_command(
    LazyGroup(
        "bench",
        help="Measure methods on a set of prompts: `specdec bench run --methods ngram --out results`.",
    )
)
main.add_command(
    LazyGroup(
        "train",
        help="Train a drafter for a model from its own answers: `specdec train mtp --out my-drafter`.",
    )
)
