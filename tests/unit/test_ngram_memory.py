"""Earlier answers are drafted from for the same caller and salt, and for nobody else; memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pytest

from drafter_service.drafters.base import Drafted, DraftItem, OpenDraft
from drafter_service.drafters.ngram.drafter import NgramDrafter
from drafter_service.drafters.ngram.memory import AnswerMemory, Owner
from drafter_service.drafters.ngram_lm.drafter import NgramLmDrafter
from specdec.contract.draft_tree import DraftTree
from tests.ngram_tables import Following, table_of

ANN, BOB = Owner("ann", ""), Owner("bob", "")


def make_drafter(memory_tokens: int = 1000) -> NgramDrafter:
    return NgramDrafter("ngram", min_size=1, max_size=4, max_draft_depth=16, memory_tokens=memory_tokens)


def draft(
    drafter: NgramDrafter, token_ids: Sequence[int], owner: Owner = ANN, depth: int = 4, nodes: int = 0
) -> Drafted:
    session = drafter.open(OpenDraft(tuple(token_ids), 1, 100, **asdict(owner)))
    (found,) = drafter.propose([DraftItem(drafter, session, depth, 0, nodes)])
    return found


def answer(
    drafter: NgramDrafter, prompt: Sequence[int], token_ids: Sequence[int], owner: Owner = ANN
) -> None:
    """Run a session to its end."""
    session = drafter.open(OpenDraft(tuple(prompt), len(prompt), 100, **asdict(owner)))
    session.commit(token_ids, len(prompt) + len(token_ids))
    drafter.close(session)


def test_an_earlier_answer_is_drafted_from() -> None:
    drafter = make_drafter()
    assert draft(drafter, [50, 7, 8]) == []
    answer(drafter, [1, 2, 3], [5, 6, 7, 8, 9, 10, 11])
    assert draft(drafter, [50, 7, 8]) == [9, 10, 11]
    assert draft(drafter, [50, 8]) == [], "one token says too little"
    assert draft(drafter, [50, 2, 3]) == [], "a prompt is not remembered"


@pytest.mark.parametrize("other", [BOB, Owner("ann", "salt"), Owner("", ""), Owner("ann", "", "other")])
def test_nobody_elses_text_is_proposed(other: Owner) -> None:
    drafter = make_drafter()
    answer(drafter, [1], [5, 6, 7, 8, 9, 10])
    assert draft(drafter, [50, 6, 7, 8], ANN) == [9, 10]
    assert draft(drafter, [50, 6, 7, 8], other) == []
    found = draft(drafter, [50, 6, 7, 8], other, nodes=12)
    assert isinstance(found, DraftTree)
    assert not len(found)


def test_longer_matches_and_the_text_itself_come_first() -> None:
    drafter = make_drafter()
    answer(drafter, [1], [5, 6, 7, 30, 31])
    assert draft(drafter, [6, 7, 40, 41, 6, 7], depth=2) == [40, 41], "the text, where both match as far"
    assert draft(drafter, [6, 7, 40, 41, 5, 6, 7], depth=2) == [30, 31], "the answer, which matches further"
    found = draft(drafter, [6, 7, 40, 41, 6, 7], depth=2, nodes=4)
    assert isinstance(found, DraftTree)
    assert set(found.token_ids) == {40, 41, 30, 31}


def test_the_latest_answer_counts() -> None:
    drafter = make_drafter()
    answer(drafter, [1], [5, 6, 7])
    answer(drafter, [1], [5, 6, 8])
    assert draft(drafter, [50, 5, 6], depth=1) == [8]


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = AnswerMemory(20, 4)
    for first in range(0, 100, 10):
        memory.add(ANN, range(first, first + 8))
        assert memory.num_tokens <= 20
    assert memory.num_tokens == 16
    assert memory.find(ANN, (90, 91, 92)) == (tuple(range(90, 98)), 3)
    assert memory.find(ANN, (70, 71, 72)) is None
    assert len(memory._places) == 2 * sum(8 - size for size in (2, 3, 4)), "nothing else is left"
    memory.add(BOB, range(1000))
    assert memory.num_tokens == 20
    assert memory.find(BOB, (990, 991)) == (tuple(range(980, 1000)), 12)
    assert memory.find(ANN, (90, 91, 92)) is None


def test_what_a_later_answer_says_too_stays_when_the_first_is_forgotten() -> None:
    memory = AnswerMemory(12, 3)
    for _ in range(3):
        memory.add(ANN, (1, 2, 3, 4, 5))
    assert memory.find(ANN, (2, 3)) == ((1, 2, 3, 4, 5), 3)


def test_it_is_off_by_default() -> None:
    drafter = NgramDrafter("ngram", min_size=1, max_size=4, max_draft_depth=16)
    answer(drafter, [1], [5, 6, 7, 8, 9])
    assert drafter.memory.num_tokens == 0
    assert draft(drafter, [50, 6, 7]) == []


def test_tables_are_mixed_with_earlier_answers() -> None:
    table = table_of({(62,): Following({9: 0.6, 10: 0.3})})
    drafter = NgramLmDrafter("ngram-lm", table, min_size=1, max_size=4, max_draft_depth=16, memory_tokens=100)
    before = draft(drafter, [50, 60, 61, 62], depth=3)
    answer(drafter, [1], [60, 61, 62, 63, 64, 65])
    assert before == [9]
    assert draft(drafter, [50, 60, 61, 62], depth=3) == [63, 64, 65]
    assert draft(drafter, [50, 60, 61, 62], BOB, depth=3) == before
