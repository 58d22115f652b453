"""README.md and docs: links lead somewhere, commands and options exist, generated pages are up to date."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from itertools import groupby, takewhile
from pathlib import Path

import click
import pytest

from docs.make_configuration import CLIENT, SERVICES, leaves, program, render
from tests.contract.test_imports import GATEWAY_LEVELS, LEVELS, PACKAGES, REPOSITORY, SOURCES

PAGES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/*.md", "deploy/*.md", "drafter_service/pretrained/*/*.md")
    for path in REPOSITORY.glob(pattern)
    # A history names what no longer exists.
    if path.name != "CHANGELOG.md"
)
CONFIGURATION = Path("docs/configuration.md")
FOREIGN_OPTIONS = {"--build-arg"}
"""Options of other programs that pages name without the program."""

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_TOP_FOLDERS = "|".join((*PACKAGES, "protos", "tests", "docs", "deploy"))
_PATH = re.compile(rf"(?<![\w/.<:-])(?:{_TOP_FOLDERS})/[\w./-]*\w")

CONTEXTS = {words: context for name in (*SERVICES, CLIENT) for words, context in leaves(name, program(name))}
COMMANDS = {words: context.command for words, context in CONTEXTS.items()}
"""What one can run, by the words one types."""


def text_of(page: Path) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def fenced(text: str, *languages: str) -> list[str]:
    """Return the code blocks of a page, of some languages or of all."""
    return [block for language, block in _FENCED.findall(text) if not languages or language in languages]


def shell_lines(text: str) -> list[str]:
    """Return the lines to type, continued lines joined, from blocks without a language. Drawings and outputs
    have the language `text`.
    """
    return [line for block in fenced(text, "") for line in block.replace("\\\n", " ").splitlines()]


def inline(text: str) -> list[str]:
    return _INLINE.findall(_FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the fragments that link to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, fragment = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        if not file.exists() or (fragment and fragment not in anchors(file.read_text(encoding="utf-8"))):
            yield target


def calls(lines: list[str]) -> Iterator[list[str]]:
    """Yield the words of each call of one of this project's programs, without redirections."""
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for is_operator, group in groupby(lexer, lambda word: word in ("|", "||", "&&", ";")):
            words = [*takewhile(lambda word: word not in (">", ">>", "<"), group)]
            if not is_operator and words and (name := words[0].rpartition("/")[2]) in (*SERVICES, CLIENT):
                yield [name, *words[1:]]


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the longest beginning that is a command, or an empty string if there is none, and the words
    after it.
    """
    for length in (3, 2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    return "", words


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"-h", "--help"}


def misuse(words: list[str]) -> str:
    """Return what is wrong with a whole command line, or an empty string. Values are placeholders and are not
    checked.
    """
    name, arguments = find_command(words)
    if not name:
        return f"{words}: no such command"
    context = CONTEXTS[name]
    try:
        given, _, _ = context.command.make_parser(context).parse_args(list(arguments))
    except click.UsageError as error:
        return f"{words}: {error.format_message()}"
    missing = [
        param.name for param in context.command.params if param.required and not given.get(param.name or "")
    ]
    return f"{words}: {missing} missing" if missing and "--help" not in arguments else ""


def test_there_is_something_to_check() -> None:
    assert {Path("README.md"), Path("deploy/README.md"), CONFIGURATION} < set(PAGES)
    assert len([words for page in PAGES for words in calls(shell_lines(text_of(page)))]) > 40
    assert len([path for page in PAGES for path in _PATH.findall(text_of(page))]) > 40


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert list(broken_links(page, text_of(page))) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_in_code_exist(page: Path) -> None:
    text = text_of(page)
    named = {path for code in (*fenced(text), *inline(text)) for path in _PATH.findall(code)}
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_in_code_blocks_would_be_understood(page: Path) -> None:
    found = calls(shell_lines(text_of(page)))
    assert [wrong for words in found if (wrong := misuse(words))] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    known = set().union(FOREIGN_OPTIONS, *map(options_of, COMMANDS.values()))
    groups = {name.rpartition(" ")[0] for name in COMMANDS} | {CLIENT}
    for code in inline(text_of(page)):
        words = code.split()
        if words[0] in (*SERVICES, CLIENT):
            name, rest = find_command(words)
            assert name or code in groups, code
            own = options_of(COMMANDS[name]) if name else set()
        elif words[0].startswith("--"):
            own, rest = known, words
        else:
            continue
        options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert options <= own, code


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_environment_variables_are_read_somewhere(page: Path) -> None:
    sources = (*SOURCES, Path("tests/fuzz/world.py"))
    source = "".join((REPOSITORY / path).read_text() for path in sources)
    of_options = set(re.findall(r"SPECDEC_\w+", text_of(CONFIGURATION)))
    for name in re.findall(r"\bSPECDEC_[A-Z_]*[A-Z]\b", text_of(page)):
        assert name in of_options or name in source, name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page: Path) -> None:
    text = text_of(page)
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    named = {
        name for code in (*fenced(text), *inline(text)) for name in re.findall(r"^make ([\w-]+)", code, re.M)
    }
    assert named <= set(targets)


def test_the_configuration_page_is_what_the_code_says() -> None:
    assert text_of(CONFIGURATION) == render(), "run `make docs`"


def test_the_configuration_page_has_every_option_once() -> None:
    page = text_of(CONFIGURATION)
    for words, command in COMMANDS.items():
        section = page.partition(f"\n### {words}\n")[2].partition("\n### ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                rows = re.findall(rf"^\| .*`{re.escape(option.opts[-1])}[ `].*$", section, re.MULTILINE)
                assert len(rows) == 1, (words, option.opts)
                assert (option.help or "")[:12] in rows[0]


def test_the_front_page_is_short() -> None:
    assert len(text_of(Path("README.md")).splitlines()) <= 150


def test_python_on_the_front_page_fits_the_client() -> None:
    (block,) = fenced(text_of(Path("README.md")), "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 8
    tree = ast.parse(block)
    names: dict[str, object] = {}
    exec(compile(ast.Module([tree.body[0]], []), "README.md", "exec"), names)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute) and call.keywords]
    assert [ast.unparse(call.func) for call in methods] == ["client.generate", "client.stream"]
    for call in methods:
        assert isinstance(call.func, ast.Attribute)
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        signature = inspect.signature(getattr(names["Client"], call.func.attr))
        signature.bind(None, *map(ast.literal_eval, call.args), **keywords)


def architecture_block(after: str) -> list[str]:
    """Return the lines of the first code block below a heading of the architecture page."""
    _, found, rest = text_of(Path("docs/architecture.md")).partition(f"\n{after}\n")
    assert found, after
    return fenced(rest)[0].splitlines()


def test_the_tree_has_a_line_for_every_folder() -> None:
    drawn: list[str] = []
    top = ""
    for line in architecture_block("## What lives where"):
        name = line.split()[0].rstrip("/")
        top = top if line.startswith(" ") else name
        drawn.append(name if name == top else f"{top}/{name}")
    assert len(drawn) == len(set(drawn))
    families = "drafter_service/drafters/<family>"
    assert [name for name in drawn if name != families and not (REPOSITORY / name).is_dir()] == []
    rooms = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert rooms - {"drafter_service/drafters"} <= set(drawn)
    assert families in drawn


def test_the_levels_are_drawn_as_they_are() -> None:
    header, _, *rows = architecture_block("### Levels")
    middle = header.index("gateway")
    for levels, cells in (
        (LEVELS, [row[:middle] for row in rows]),
        (GATEWAY_LEVELS, [row[middle:] for row in rows]),
    ):
        drawn = [set(cell.split()) for cell in cells if cell.strip()]
        assert drawn == list(reversed(levels))


def test_the_checks_see_what_is_wrong() -> None:
    page = Path("docs/serving.md")
    wrong = "[a](gone.md) [b](serving.md#gone) [c](#gone) [d](../README.md#how-it-works) [e](https://x.y)"
    assert list(broken_links(page, wrong)) == ["gone.md", "serving.md#gone", "#gone"]
    block = "```\nbin/specdec bench run \\\n --nope 'a | b' --out D > f  # --x\nx specdec | specdec up\n```\n"
    lines = list(calls(shell_lines(f"{block}```text\nspecdec x\n```\n")))
    assert lines == [["specdec", "bench", "run", "--nope", "a | b", "--out", "D"], ["specdec", "up"]]
    assert "--nope" in misuse(lines[0])
    assert "missing" in misuse(["specdec", "bench", "run"])
    assert "no such command" in misuse(["specdec", "fly"])
    assert misuse(["specdec", "generate", "-", "-k", "4"]) == ""
    assert "requires an argument" in misuse(["specdec-verifier", "--model"])
    assert anchors("# The `same` output, again?\n```\n# not\n```\n") == {"the-same-output-again"}
    assert _PATH.findall("see specdec/cli/main.py, (tests/unit) a/specdec/x") == [
        "specdec/cli/main.py",
        "tests/unit",
    ]
