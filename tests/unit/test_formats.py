"""Output formats in the verifier: a row allows what follows its own tokens, and a format that nobody can
follow, or that was made to do harm, is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from specdec.contract.draft_tree import NO_DRAFT, DraftTree, from_chains
from specdec.contract.errors import InternalError, InvalidArgumentError
from specdec.contract.output_format import OutputFormat
from tests.tiny_models import EOS, byte_tokenizer
from verifier_service.formats import Formats
from verifier_service.guide import Guide, MaskRows
from verifier_service.masks import MaskBuffers

NUM_ROWS_OF_HEAD = 300
"""More than there are tokens: the rows of the head from 260 on stand for none."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS = [
    OutputFormat(json_schema=json.dumps(SCHEMA)),
    OutputFormat(json_object=True),
    OutputFormat(regex=r"(foo|bar)+\d{2,4}[^x]*"),
    OutputFormat(choices=("yes", "no", "yes please", "ja/nein", 'say "hi"')),
]
TOO_COMPLEX = OutputFormat(regex=f"x?y(z|{'a?' * 2000})")
"""Of it, what follows "y" cannot be found out, whereas what precedes "y" can."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def formats(folder: Path) -> Formats:
    return Formats(folder, NUM_ROWS_OF_HEAD, [EOS])


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text)["input_ids"]
    return found


def rows_of(guide: Guide, output: Sequence[int], draft: DraftTree = NO_DRAFT) -> MaskRows:
    rows = numpy.zeros((len(draft) + 1, guide.num_words), numpy.int32)
    assert not guide.fill(rows, output, draft)
    return rows


def allowed(row: numpy.typing.NDArray[numpy.int32]) -> set[int]:
    bits = numpy.unpackbits(row.view(numpy.uint8), bitorder="little")
    return set(bits.nonzero()[0].tolist())


async def random_draft(random: Random, formats: Formats, asked: OutputFormat, output: list[int]) -> DraftTree:
    """Return a draft that follows the format for a while, a chain or a tree."""
    chains = []
    for _ in range(random.choice([1, 3])):
        chain: list[int] = []
        guide = await formats.guide(asked, output, {EOS})
        for _ in range(random.randrange(1, 7)):
            possible = sorted(allowed(rows_of(guide, [*output, *chain])[0]) - {EOS})
            if not possible or random.random() < 0.15:
                chain += [random.choice([EOS, random.randrange(260)]), random.randrange(260)]
                break
            chain.append(random.choice(possible))
        chains.append(chain)
    return from_chains(chains, 16)


@pytest.mark.parametrize("asked", FORMATS, ids=str)
async def test_each_row_allows_what_follows_its_own_tokens_and_drafts_leave_no_trace(
    asked: OutputFormat, formats: Formats
) -> None:
    random = Random(7)
    guide, output, num_trees, num_seen = await formats.guide(asked, [], {EOS}), list[int](), 0, 0
    for _ in range(12):
        draft = await random_draft(random, formats, asked, output)
        num_trees += not draft.is_chain
        rows = rows_of(guide, output, draft)
        for node in range(-1, len(draft)):
            path = [draft.token_ids[index] for index in draft.path_to(node)]
            fresh = await formats.guide(asked, [], {EOS})
            before, follows = list(output), True
            for token_id in path:
                follows = follows and token_id != EOS and token_id in allowed(rows_of(fresh, before)[0])
                before.append(token_id)
            if follows:
                assert (rows[node + 1] == rows_of(fresh, before)[0]).all(), (output, path)
                num_seen += 1
            else:
                assert (rows[node + 1] == -1).all(), "a row that nobody gets to allows everything"
        if possible := sorted(allowed(rows[0]) - {EOS}):
            output.append(random.choice(possible))
        else:
            guide, output = await formats.guide(asked, [], {EOS}), []
    assert num_trees
    assert num_seen > 15


async def test_only_tokens_of_the_vocabulary_are_allowed_and_special_ones_never(formats: Formats) -> None:
    guide = await formats.guide(OutputFormat(regex="(.|\n)*x"), [], {EOS})
    assert guide.num_words * 32 >= NUM_ROWS_OF_HEAD
    first = allowed(rows_of(guide, [])[0])
    assert ids("a")[0] in first
    assert max(first) < 256


async def test_a_complete_text_can_only_end(formats: Formats) -> None:
    guide = await formats.guide(OutputFormat(choices=("yes", "yes please")), [], {EOS})
    assert allowed(rows_of(guide, ids("yes"))[0]) == {EOS, *ids(" ")}
    rows = rows_of(guide, ids("yes please"), DraftTree((EOS, EOS)))
    assert allowed(rows[0]) == {EOS}
    assert (rows[1:] == -1).all(), "behind the end nothing is asked"


async def test_an_answer_goes_on_where_another_session_began_it(formats: Formats) -> None:
    begun = ids('{"name": "Jo", "a')
    anew = await formats.guide(FORMATS[0], begun, {EOS})
    whole = await formats.guide(FORMATS[0], [], {EOS})
    assert (rows_of(anew, begun) == rows_of(whole, begun)).all()
    assert allowed(rows_of(anew, begun)[0]) == set(ids("g"))


async def test_a_beginning_that_does_not_follow_the_format_is_refused(formats: Formats) -> None:
    with pytest.raises(InvalidArgumentError, match="does not follow the output format"):
        await formats.guide(FORMATS[0], ids("Sure! {"), {EOS})


async def test_an_answer_goes_on_although_others_have_used_up_what_they_share(formats: Formats) -> None:
    random, a, b = Random(1), *ids("ab")
    asked = OutputFormat(regex="([ab]*a[ab]{13}c)*")
    for _ in range(25):
        begun = random.choices([a, b], k=600)
        guide = await formats.guide(asked, begun, {EOS})
    assert {a, b} <= allowed(rows_of(guide, begun)[0])


async def test_whitespace_in_json_has_an_end(formats: Formats) -> None:
    guide = await formats.guide(OutputFormat(json_object=True), [], {EOS})
    assert set(ids(" ")) <= allowed(rows_of(guide, ids("{" + " " * 31))[0])
    assert not set(ids(" \n\t")) & allowed(rows_of(guide, ids("{" + " " * 32))[0])


async def test_what_a_draft_leads_to_fails_nobody_who_does_not_get_there(formats: Formats) -> None:
    x, y, z = ids("xyz")
    draft = DraftTree((y, x, y, z), (-1, -1, 1, -1))
    guide, other = [await formats.guide(TOO_COMPLEX, [], {EOS}) for _ in range(2)]
    rows = numpy.zeros((5, guide.num_words), numpy.int32)
    assert guide.fill(rows, [], draft) == {0, 1}, "z cannot be picked"
    assert allowed(rows[0]) == {x, y}
    assert guide.fill(rows[:2], [x], DraftTree((y,))) == {0}
    assert [allowed(row) for row in (rows[0], rows_of(other, [x])[0])] == [{y}, {y}]
    with pytest.raises(InvalidArgumentError, match="too complex") as caught:
        guide.fill(rows[:1], [x, y], NO_DRAFT)
    assert caught.value.reason == "OUTPUT_FORMAT_TOO_COMPLEX"
    assert allowed(rows_of(await formats.guide(TOO_COMPLEX, [], {EOS}), [])[0]) == {x, y}


async def test_drafts_that_there_is_no_time_to_follow_are_unknown(formats: Formats) -> None:
    a, b, x = ids("abx")
    compiled = await formats.compiled(OutputFormat(regex="[ab]{9}"))
    guide = Guide(compiled, NUM_ROWS_OF_HEAD, [], {EOS}, draft_seconds=0)
    patient = Guide(compiled, NUM_ROWS_OF_HEAD, [], {EOS})
    draft = DraftTree((a, x, b, b), (-1, -1, -1, 0))
    rows = numpy.zeros((5, guide.num_words), numpy.int32)
    for output in ([], [a], [a, b]):
        assert guide.fill(rows, output, draft) == {0, 2}, "what follows an unknown node cannot be picked"
        assert (rows[0] == rows_of(patient, output)[0]).all()
        assert (rows[1:] == -1).all()
    assert not patient.fill(rows, [a, b], draft)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (OutputFormat(regex="(a|b"), "unclosed group"),
        (OutputFormat(regex="(?=a)b"), "look-around"),
        (OutputFormat(regex=r"(a)\1"), "backreferences are not supported"),
        (OutputFormat(json_schema='{"type": "objekt"}'), "Invalid type: objekt"),
        (OutputFormat(json_schema='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (OutputFormat(json_schema='{"type": "integer", "minimum": 5, "maximum": 3}'), "Unsatisfiable"),
        (OutputFormat(json_schema='{"$ref": "#"}'), "cannot be followed"),
        (OutputFormat(json_schema='{"$ref": "https://example.com/schema.json"}'), "does not fetch"),
        (OutputFormat(json_schema='{"items":' * 200 + "{}" + "}" * 200), "recursion limit"),
    ],
    ids=str,
)
async def test_a_format_that_cannot_be_followed_is_refused(
    asked: OutputFormat, words: str, formats: Formats
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await formats.guide(asked, [], {EOS})
    assert caught.value.reason == "BAD_OUTPUT_FORMAT"
    assert caught.value.field == "output_format"
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert "<" not in caught.value.message


async def test_where_the_model_has_no_token_to_go_on_it_is_said_so(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in byte_tokenizer().convert_ids_to_tokens(ids("\u00e9")):
        del tokenizer["model"]["vocab"][token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    formats = Formats(tmp_path, NUM_ROWS_OF_HEAD, [EOS])
    guide = await formats.guide(OutputFormat(choices=("a\u00e9", "b")), [], {EOS})
    assert allowed(rows_of(guide, [])[0]) == set(ids("ab"))
    with pytest.raises(InvalidArgumentError, match="cannot be followed: the model has no token") as caught:
        rows_of(guide, ids("a"))
    assert caught.value.reason == "BAD_OUTPUT_FORMAT"
    with pytest.raises(InvalidArgumentError, match="cannot be followed: the model has no token"):
        await formats.guide(OutputFormat(choices=("\u00e9",)), [], {EOS})


async def test_masks_of_a_pass_lie_in_buffers_that_stay(formats: Formats, caplog: Any) -> None:
    def session(guide: Any, output: list[int]) -> Any:
        return SimpleNamespace(guide=guide, token_ids=[1, 2, *output], prompt_length=2)

    class Broken:
        num_words = 10

        def fill(self, *_: object) -> frozenset[int]:
            raise KeyError("a defect")

    buffers, yes = MaskBuffers(torch.device("cpu")), ids("yes")
    guide, other = [await formats.guide(FORMATS[3], [], {EOS}) for _ in range(2)]
    assert [each.mask for each in buffers.masks([(session(None, []), NO_DRAFT)])] == [None]
    rounds = [
        (session(guide, yes[:1]), DraftTree(tuple(yes[1:]))),
        (session(None, []), DraftTree((1, 2))),
        (session(Broken(), []), DraftTree((1,))),
        (session(other, []), NO_DRAFT),
    ]
    first, none, broken, last = buffers.masks(rounds)
    assert none.mask is None
    assert isinstance(broken.error, InternalError)
    assert [allowed(row) for row in first.mask.numpy()] == [set(ids("e")), set(ids("s")), {EOS, *ids(" ")}]  # type: ignore[union-attr]
    assert allowed(last.mask.numpy()[0]) == set(ids("ynjs"))  # type: ignore[union-attr]
    where = first.mask.data_ptr()  # type: ignore[union-attr]
    assert buffers.masks(rounds[:1])[0].mask.data_ptr() == where  # type: ignore[union-attr]
    (many,) = buffers.masks([(session(other, []), DraftTree((yes[0], *[5] * 99)))])
    assert many.mask.shape == (101, guide.num_words)  # type: ignore[union-attr]
    assert allowed(many.mask.numpy()[1]) == set(ids("e"))  # type: ignore[union-attr]
