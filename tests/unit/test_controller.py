"""The choice of draft sizes, over simulated verifiers and drafters whose costs are known."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from gateway.rounds.controller import Controller, FixedSize
from gateway.rounds.option import Candidate
from gateway.rounds.records import NEVER_RIGHT
from gateway.rounds.vocabulary import Draft, DraftSize, Proposal, Round, SizeControl, Verified

MS = 1_000_000


class Replica:
    """Stands for a verifier."""


class World:
    """Rounds whose times and acceptance follow known laws.

    Args:
        pass_ms: time of a pass by its tokens.
        draft_ms: time of a draft by K.
        rate: chance that a draft token is accepted after the one before was.
        batch_size: sessions in every pass, all drafting as this one does.
        gain: by how much a tree raises the rate.
        queue_share: time an item waits for its pass, over the pass.
        transport_ms: time an answer of the verifier is on the wire.
    """

    def __init__(
        self,
        pass_ms: Callable[[float], float],
        draft_ms: Callable[[int], float],
        rate: float,
        *,
        batch_size: int = 1,
        gain: float = 0.0,
        queue_share: float = 0.0,
        transport_ms: int = 1,
    ) -> None:
        self.pass_ms, self.draft_ms, self.rate = pass_ms, draft_ms, rate
        self.batch_size, self.gain, self.queue_share = batch_size, gain, queue_share
        self.transport_ns = transport_ms * MS
        self._random = random.Random(0)

    def round(self, size: DraftSize) -> Round:
        """Return one round of that size."""
        num_nodes = size.draft_nodes or size.draft_depth
        rate = self.rate + (self.gain if size.draft_nodes else 0)
        accepted = 0
        while accepted < size.draft_depth and self._random.random() < rate:
            accepted += 1
        num_tokens = self.batch_size * (num_nodes + 1)
        noise = self._random.uniform(0.9, 1.1)
        compute_ns = int(self.pass_ms(num_tokens) * MS * noise)
        draft = Draft(tuple(range(num_nodes)), elapsed_ns=int(self.draft_ms(size.draft_depth) * MS))
        verified = Verified(
            accepted,
            0,
            server_ns=int(compute_ns * (1 + self.queue_share)),
            elapsed_ns=int(compute_ns * (1 + self.queue_share)) + self.transport_ns,
            compute_ns=compute_ns,
            batch_size=self.batch_size,
            batch_tokens=num_tokens,
        )
        return Round(draft, verified)


def run(control: SizeControl, world: World, num_rounds: int) -> list[DraftSize]:
    """Return the sizes of that many rounds."""
    sizes = []
    for _ in range(num_rounds):
        size = control.choose(1000)
        control.observe(size, world.round(size))
        sizes.append(size)
    return sizes


def session(controller: Controller, replica: Replica, budgets: Sequence[int] = (0,)) -> SizeControl:
    """Return the control of a generation that may draft up to 16 in a row and starts with 4."""
    candidate = Candidate("mtp", DraftSize(4), longest=16, budgets=tuple(budgets))
    return controller.session(replica, [candidate])


def usual(sizes: Sequence[DraftSize]) -> DraftSize:
    """Return the size that is chosen most often."""
    return Counter(sizes).most_common(1)[0][0]


def learned(world: World, *, num_rounds: int = 400, budgets: Sequence[int] = (0,)) -> DraftSize:
    """Return the size that is chosen once the world is known."""
    return usual(run(session(Controller(), Replica(), budgets), world, num_rounds)[num_rounds // 2 :])


def test_a_session_that_goes_on_elsewhere_learns_and_chooses_for_where_it_is() -> None:
    controller, here, there = Controller(), Replica(), Replica()
    cheap, dear = World(flat, lambda k: 1.0, 0.8), World(lambda n: 5.0 + 30.0 * n, lambda k: 1.0, 0.5)
    run(session(controller, there), dear, 400)
    control = session(controller, here)
    assert usual(run(control, cheap, 400)[200:]).draft_depth > 4
    loads = {replica: controller._loads[replica][True] for replica in (here, there)}
    num_rounds, passes = loads[here].num_rounds, dict(loads[here].passes)
    assert (len(loads[here].sessions), len(loads[there].sessions)) == (1, 1)
    control.goes_on_at(there)
    assert (len(loads[here].sessions), len(loads[there].sessions)) == (0, 2)
    # What the other verifier costs is known at once.
    assert usual(run(control, dear, 8)).draft_depth < 2
    assert (loads[here].num_rounds, loads[here].passes) == (num_rounds, passes)
    assert loads[there].num_rounds > 400
    control.goes_on_at(here)
    assert usual(run(control, cheap, 8)).draft_depth > 4
    control.close()
    assert (len(loads[here].sessions), len(loads[there].sessions)) == (0, 1)


def flat(num_tokens: float) -> float:
    return 40.0


def steep(num_tokens: float) -> float:
    return 20.0 + 5.0 * num_tokens


def test_cheap_passes_and_good_drafts_make_long_drafts() -> None:
    assert learned(World(flat, lambda k: 1.0, 0.9)).draft_depth >= 12


def test_drafts_that_are_never_accepted_end() -> None:
    assert learned(World(flat, lambda k: 2.0 * k, 0.0)) == DraftSize(0)


def test_drafts_end_where_a_busy_verifier_pays_for_every_token() -> None:
    alone = World(steep, lambda k: 2.0, 0.6)
    busy = World(steep, lambda k: 2.0, 0.4, batch_size=8)
    assert learned(alone).draft_depth > 0
    assert learned(busy) == DraftSize(0)


class Cutting(World):
    """Its drafter knows how likely its tokens are, and stops where a path is less likely than asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = list[float]()

    def round(self, size: DraftSize) -> Round:
        self.asked.append(size.min_path_confidence)
        length, path = min(size.draft_depth, 1), self.rate
        while length < size.draft_depth and path * self.rate >= size.min_path_confidence:
            length, path = length + 1, path * self.rate
        return super().round(replace(size, draft_depth=length))


def confidence_of(world: Cutting, budgets: Sequence[int] = (0,)) -> float:
    """Return the path confidence that is asked for in the end."""
    sizes = run(session(Controller(), Replica(), budgets), world, 400)
    return median(size.min_path_confidence for size in sizes[200:] if size.draft_depth)


def test_a_token_must_be_as_likely_as_it_is_dear() -> None:
    assert confidence_of(Cutting(flat, lambda k: 5.0, 0.8)) < 0.02, "more tokens cost nothing"
    cheap = confidence_of(Cutting(flat, lambda k: 0.5 * k, 0.8))
    dear = confidence_of(Cutting(flat, lambda k: 4.0 * k, 0.8))
    assert 0.01 < cheap < dear / 3
    # A further token takes 4 of the 45 ms or so in which two or three tokens come.
    assert 0.15 < dear <= 0.5


def test_verifying_costs_as_well() -> None:
    assert confidence_of(Cutting(lambda tokens: 30 + tokens, lambda k: 2.0, 0.8)) > 0.03


def test_a_size_that_a_request_fixed_leaves_nothing_out() -> None:
    sizes = run(FixedSize(DraftSize(4)), Cutting(steep, lambda k: 9.0 * k, 0.5), 50)
    assert {size.min_path_confidence for size in sizes} == {0.0}


def test_drafts_end_though_no_pass_was_ever_without() -> None:
    """On a busy verifier a session that tries no draft still shares its passes with others' drafts."""

    class Busy(World):
        def round(self, size: DraftSize) -> Round:
            done = super().round(size)
            tokens = done.verified.batch_tokens + 7 * 3  # of seven sessions that draft as ever
            compute_ns = int(self.pass_ms(tokens) * MS)
            verified = replace(
                done.verified,
                batch_size=8,
                batch_tokens=tokens,
                compute_ns=compute_ns,
                server_ns=compute_ns,
                elapsed_ns=compute_ns + MS,
            )
            return replace(done, verified=verified)

    assert learned(Busy(steep, lambda k: 2.0, 0.3)) == DraftSize(0)


def test_who_shares_passes_tries_other_sizes_less_often() -> None:
    def num_tries(batch_size: int) -> int:
        world = World(flat, lambda k: 4.0, 0.0, batch_size=batch_size)
        sizes = run(session(Controller(), Replica()), world, 1200)[400:]
        assert usual(sizes) == DraftSize(0)
        return sum(size != DraftSize(0) for size in sizes)

    alone, busy = num_tries(1), num_tries(8)
    assert 0 < busy <= alone / 2


def test_a_queue_is_no_reason_to_draft() -> None:
    """Where all wait for long passes of others, shorter passes make everyone wait less."""
    busy = World(steep, lambda k: 2.0, 0.4, batch_size=8, queue_share=1.5)
    assert learned(busy) == DraftSize(0)


def test_drafts_are_longer_where_every_answer_comes_a_long_way() -> None:
    near, far = (World(steep, lambda k: 2.0, 0.8, transport_ms=ms) for ms in (0, 80))
    assert 0 < learned(near).draft_depth < learned(far).draft_depth


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.85])
def test_the_choice_is_nearly_the_best(rate: float) -> None:
    world = World(lambda n: 35 + 1.0 * n, lambda k: 2.5 * k, rate)

    def tokens_per_ms(k: int) -> float:
        expected = sum(rate**depth for depth in range(k + 1))
        return expected / (world.pass_ms(k + 1) + 1 + (world.draft_ms(k) if k else 0))

    best = max(map(tokens_per_ms, range(17)))
    assert tokens_per_ms(learned(world).draft_depth) > 0.95 * best


def test_trees_are_taken_where_passes_are_cheap_and_left_where_they_are_not() -> None:
    assert learned(World(flat, lambda k: 2.0, 0.4, gain=0.3), budgets=(0, 8, 16)).draft_nodes > 0
    assert learned(World(steep, lambda k: 2.0, 0.5, gain=0.05), budgets=(0, 8, 16)).draft_nodes == 0


def test_a_new_session_starts_with_what_others_learned() -> None:
    controller, replica = Controller(), Replica()
    run(session(controller, replica), World(flat, lambda k: 1.0, 0.95), 400)
    assert usual(run(session(controller, replica), World(flat, lambda k: 1.0, 0.95), 8)).draft_depth > 8


def short_answers(
    controller: Controller, world: World, *, first_ms: int, budgets: Sequence[int]
) -> list[DraftSize]:
    """Run forty answers of twelve rounds, whose first drafts take `first_ms` longer; return the sizes of the
    last ten.
    """
    replica, sizes = Replica(), []
    for _ in range(40):
        control, is_first = session(controller, replica, budgets), True
        for _ in range(12):
            size = control.choose(1000)
            done = world.round(size)
            if size.draft_depth and is_first:
                elapsed_ns = done.draft.elapsed_ns + first_ms * MS
                done = replace(done, draft=replace(done.draft, elapsed_ns=elapsed_ns, is_first=True))
                is_first = False
            control.observe(size, done)
            sizes.append(size)
        control.close()
    return sizes[-120:]


def test_the_first_draft_of_a_session_is_not_what_drafts_cost() -> None:
    """The first draft maps the target's state, reads the prompt, and may load the target's embedding."""
    sizes = short_answers(Controller(), World(flat, lambda k: 1.0, 0.8), first_ms=400, budgets=(0,))
    assert usual(sizes).draft_depth >= 6


def test_a_draft_that_was_slow_once_is_forgotten() -> None:
    control, world = session(Controller(), Replica()), World(flat, lambda k: 1.0, 0.8)
    run(control, world, 2)
    for _ in range(2):
        size = control.choose(1000)
        done = world.round(size)
        control.observe(size, replace(done, draft=replace(done.draft, elapsed_ns=900 * MS)))
    assert usual(run(control, world, 600)[300:]).draft_depth >= 12


def test_short_answers_find_out_about_trees_together() -> None:
    world = World(flat, lambda k: 1.0, 0.4, gain=0.3)
    assert usual(short_answers(Controller(), world, first_ms=0, budgets=(0, 8, 16))).draft_nodes > 0


def test_trees_grow_only_while_it_pays() -> None:
    def tried(world: World) -> set[int]:
        control = session(Controller(), Replica(), (0, 8, 16, 32, 64))
        return {size.draft_nodes for size in run(control, world, 400)}

    assert 64 in tried(World(flat, lambda k: 2.0, 0.4, gain=0.3))
    assert max(tried(World(steep, lambda k: 2.0, 0.5, gain=0.05))) <= 16


def test_what_is_not_the_best_is_tried_now_and_then() -> None:
    """No draft, shorter and longer drafts, and the budgets next to the best one are tried."""

    class Steady(World):
        def round(self, size: DraftSize) -> Round:
            done = super().round(size)
            accepted = min(size.draft_depth, 3 if size.draft_nodes else 1)
            return replace(done, verified=replace(done.verified, num_accepted_tokens=accepted))

    control = session(Controller(), Replica(), (0, 8, 16, 32))
    sizes = run(control, Steady(lambda n: 40 + 1.5 * n, lambda k: 3.0 * k, 0.0), 600)[200:]
    assert usual(sizes) == DraftSize(3, 8)
    assert sizes.count(DraftSize(3, 8)) > 0.8 * len(sizes)
    for other in (DraftSize(0), DraftSize(2, 8), DraftSize(4, 8), DraftSize(4, 0), DraftSize(4, 16)):
        assert other in sizes


def test_no_tree_is_deeper_than_it_has_nodes() -> None:
    control = session(Controller(), Replica(), (0, 8))
    sizes = run(control, World(flat, lambda k: 0.1, 0.6, gain=0.38), 400)
    trees = [size for size in sizes if size.draft_nodes]
    assert trees
    assert all(size.draft_depth <= 8 for size in trees)


def test_each_session_follows_its_own_text() -> None:
    controller, replica = Controller(), Replica()
    easy, hard = World(flat, lambda k: 2.0 * k, 0.9), World(flat, lambda k: 2.0 * k, 0.1)
    first, second = session(controller, replica), session(controller, replica)
    for _ in range(10):
        easy_sizes, hard_sizes = run(first, easy, 20), run(second, hard, 20)
    assert usual(easy_sizes).draft_depth > usual(hard_sizes).draft_depth + 2


def test_the_load_is_followed() -> None:
    control = session(Controller(), Replica())
    quiet = World(steep, lambda k: 2.0, 0.6)
    busy = World(steep, lambda k: 2.0, 0.4, batch_size=8)
    assert usual(run(control, quiet, 300)[100:]).draft_depth > 0
    assert usual(run(control, busy, 600)[300:]).draft_depth == 0
    assert usual(run(control, quiet, 600)[300:]).draft_depth > 0


@pytest.mark.parametrize(
    "lost",
    [
        Draft(elapsed_ns=2_000 * MS, fallback_reason="no draft within 2 s"),
        Draft((5,), elapsed_ns=2_000 * MS, proposals=(Proposal("a", fallback_reason="late"), Proposal("b"))),
    ],
    ids=["the only one", "one of two"],
)
def test_a_lost_drafter_says_nothing_of_drafts(lost: Draft) -> None:
    controller, replica = Controller(), Replica()
    world = World(flat, lambda k: 1.0, 0.9)
    control = session(controller, replica)
    run(control, world, 200)
    for _ in range(50):
        size = control.choose(1000)
        control.observe(size, Round(lost, world.round(DraftSize(0)).verified))
    assert usual(run(control, world, 20)).draft_depth > 8


def test_sizes_follow_the_drafters_that_are_asked() -> None:
    """While one of two is left alone, drafts are what the other one makes of them."""
    control = session(Controller(), Replica())
    run(control, World(flat, lambda k: 90.0, 0.5), 200)
    world = World(flat, lambda k: 1.0, 0.5)
    sizes = []
    for _ in range(1000):
        size = control.choose(1000)
        done = world.round(size)
        proposals = (Proposal("a", fallback_reason="wrong", fallback_code=NEVER_RIGHT), Proposal("b"))
        control.observe(size, replace(done, draft=replace(done.draft, proposals=proposals)))
        sizes.append(size)
    assert usual(sizes[:20]) == DraftSize(0), "with both, drafts took too long"
    assert usual(sizes[700:]).draft_depth > 0


def test_a_round_in_which_nobody_was_asked_says_nothing_of_drafts() -> None:
    left_alone = Proposal("a", fallback_reason="wrong", fallback_code=NEVER_RIGHT)
    assert Draft((5,), proposals=(left_alone, Proposal("b"))).is_complete
    assert Draft(fallback_reason="a: wrong", proposals=(left_alone, Proposal("b"))).is_complete
    assert not Draft(fallback_reason="a: wrong", proposals=(left_alone, left_alone)).is_complete
    assert not Draft((5,), proposals=(left_alone, Proposal("b", fallback_reason="late"))).is_complete
    assert not Draft(fallback_reason="wrong", fallback_code=NEVER_RIGHT).is_complete


def test_a_draft_is_no_longer_than_there_is_room_for() -> None:
    control = session(Controller(), Replica())
    assert control.choose(2) == DraftSize(2)
    assert control.choose(0) == DraftSize(0)
    assert FixedSize(DraftSize(4, 9)).choose(1) == DraftSize(1, 9)


def test_prompts_that_are_read_in_a_pass_say_nothing_of_what_drafts_cost() -> None:
    """Prompts make passes larger and cost less a token, since none of theirs but the last has logits."""

    class Reading(World):
        def round(self, size: DraftSize) -> Round:
            done = super().round(size)
            if self._random.random() < 0.5:
                return done
            tokens = done.verified.batch_tokens + 200
            return replace(
                done, verified=replace(done.verified, batch_tokens=tokens, batch_background_tokens=200)
            )

    assert learned(Reading(steep, lambda k: 2.0, 0.3, batch_size=8)) == DraftSize(0)


def test_trees_that_only_easy_texts_had_do_not_look_better_for_that() -> None:
    controller, replica = Controller(), Replica()
    chain, tree = DraftSize(4), DraftSize(4, 15)
    easy, hard = (World(lambda tokens: 20 + 1.0 * tokens, lambda k: 1.0, rate) for rate in (0.9, 0.3))
    for _ in range(30):
        for world, sizes in ((easy, (chain, tree)), (hard, (chain, chain))):
            text = session(controller, replica, (0, 15))
            for size in sizes:
                for _ in range(12):
                    text.observe(size, world.round(size))
            text.close()
    assert session(controller, replica, (0, 15)).choose(1000).draft_nodes == 0


def test_experiments_take_a_bounded_share_of_the_time() -> None:
    """A method that is far dearer than another is tried at the start, and then for a small share of the
    time."""
    controller, replica = Controller(), Replica()
    candidates = [Candidate(name, DraftSize(4, method=name), longest=8) for name in ("good", "dear")]
    control = controller.session(replica, candidates)
    good, dear = (World(lambda tokens: 20.0, lambda k, ms=ms: ms, 0.6) for ms in (1.0, 400.0))  # type: ignore[misc]
    time_ns: Counter[str] = Counter()
    last: tuple[DraftSize, Round] | None = None
    for number in range(2000):
        size = control.choose(1000)
        if last:
            control.observe(*last)  # a round is looked at when the next one is on its way
        done = (dear if size.method == "dear" else good).round(size)
        last = size, done
        if number >= 300:
            time_ns[size.method] += done.draft.elapsed_ns + done.verified.elapsed_ns
    assert time_ns["dear"] < 0.06 * time_ns.total()
    assert time_ns["good"] > 0.9 * time_ns.total()


def test_sampled_answers_learn_nothing_from_greedy_ones() -> None:
    """Sampled tokens are guessed less often, and their picks take time."""
    controller, replica = Controller(), Replica()
    candidate = Candidate("mtp", DraftSize(4), longest=16)

    def sizes(world: World, *, is_greedy: bool) -> list[DraftSize]:
        control = controller.session(replica, [candidate], is_greedy=is_greedy)
        found = run(control, world, 400)
        control.close()
        return found[200:]

    assert usual(sizes(World(flat, lambda k: 1.0, 0.9), is_greedy=True)).draft_depth > 8
    assert usual(sizes(World(steep, lambda k: 1.0, 0.1), is_greedy=False)).draft_depth == 0
    assert usual(sizes(World(flat, lambda k: 1.0, 0.9), is_greedy=True)[:20]).draft_depth > 8
