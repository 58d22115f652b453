"""How a request is drafted for: by which method and drafters, and how much a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway.request.backends import Backends
from gateway.rounds.controller import Controller, FixedSize
from gateway.rounds.option import Candidate
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, SizeControl
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import AUTO, PLAIN, drafters_of, validate_method
from specdec.v1 import drafter_pb2, gateway_pb2, verifier_pb2

_NODE_BUDGETS = (7, 15, 31, 63)
"""Sizes of draft trees that the controller tries; with the anchor a power of two, as kernels like best."""
_CPU = "cpu"
_UNKNOWN_DRAFTER = drafter_pb2.DrafterInfo(default_draft_depth=4)
"""Stands for a drafter whose service was never reached: it may come up while the request runs."""


@dataclass(frozen=True, slots=True)
class Proposer:
    """A drafter's part in a request."""

    drafter: str
    draft_depth: int
    """Most tokens it drafts in a row."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Who drafts, and how much."""

    method: str = PLAIN
    proposers: tuple[Proposer, ...] = ()
    draft_nodes: int = 0
    """Most tokens of a draft that is a tree, of one drafter or merged; 0: there are only chains."""
    size: DraftSize = PLAIN_SIZE
    """What every round asks for, or the first round where drafts are chosen round by round."""
    candidates: tuple[Candidate, ...] = ()
    """Methods and sizes to choose from round by round; empty: `size` stays."""
    is_offered: bool = True
    """Whether all of its drafters are known."""

    @property
    def num_reserved_nodes(self) -> int:
        """KV kept free for trees to a session's very end, in tokens; chosen sizes do without a reserve."""
        return 0 if self.candidates else self.draft_nodes

    def control(self, controller: Controller, verifier: object, *, is_greedy: bool) -> SizeControl:
        """Return what decides what each round drafts, on that verifier.

        Drafts are chosen for methods that exist: of a name that a client made up nothing is kept.
        """
        if not self.candidates or not self.is_offered:
            return FixedSize(self.size)
        return controller.session(verifier, self.candidates, is_greedy=is_greedy)


def plan_drafts(
    request: gateway_pb2.GenerateRequest,
    backends: Backends,
    verifier: verifier_pb2.VerifierServiceGetInfoResponse,
) -> DraftPlan:
    """Plan the method, drafters, K and node budget in effect, within the verifier's limits."""
    max_draft_nodes = verifier.max_draft_nodes
    method = _settle_method(request, backends)
    if request.draft_nodes > max_draft_nodes:
        raise InvalidArgumentError(
            f"draft_nodes is {request.draft_nodes}; the verifier takes at most {max_draft_nodes} draft "
            "tokens a round.",
            field="draft_nodes",
        )
    if request.HasField("draft_depth"):
        if method == AUTO:
            method = backends.best_guess
        return _fixed_drafts(request, method, _drafters(method, backends), max_draft_nodes)
    if method == AUTO:
        return _auto_drafts(request, backends, verifier)
    return _chosen_drafts(request, method, _drafters(method, backends), verifier)


def _drafters(method: str, backends: Backends) -> dict[str, drafter_pb2.DrafterInfo]:
    """Return the drafters of a method by name."""
    known = backends.known_drafters
    return {name: known.get(name, _UNKNOWN_DRAFTER) for name in drafters_of(method)}


def _auto_drafts(
    request: gateway_pb2.GenerateRequest,
    backends: Backends,
    verifier: verifier_pb2.VerifierServiceGetInfoResponse,
) -> DraftPlan:
    """Plan rounds whose method is chosen as well."""
    plans = [
        _chosen_drafts(request, method, _drafters(method, backends), verifier, tag=method)
        for method in backends.candidates
    ]
    if not plans:
        return DraftPlan()
    proposers = {proposer.drafter: proposer for plan in plans for proposer in plan.proposers}
    return DraftPlan(
        AUTO,
        tuple(proposers.values()),
        max(plan.draft_nodes for plan in plans),
        plans[0].size,
        candidates=tuple(candidate for plan in plans for candidate in plan.candidates),
    )


def _fixed_drafts(
    request: gateway_pb2.GenerateRequest,
    method: str,
    drafters: Mapping[str, drafter_pb2.DrafterInfo],
    max_draft_nodes: int,
) -> DraftPlan:
    """Plan rounds that each ask for what the request says."""
    limits = _limits(drafters, max_draft_nodes)
    if limits and request.draft_depth > max(limits):
        raise InvalidArgumentError(
            f"draft_depth is {request.draft_depth}; {method} drafts at most {max(limits)} tokens a round.",
            field="draft_depth",
        )
    if limits and request.draft_nodes and not request.draft_depth:
        raise InvalidArgumentError(
            "draft_depth 0 is plain decoding, which has no trees; leave draft_nodes out, or "
            "draft_depth, to have it chosen.",
            field="draft_nodes",
        )
    budget = request.draft_nodes or max_draft_nodes
    counts = [min(request.draft_depth, limit, budget) for limit in limits]
    if not any(counts):
        return DraftPlan(method)
    num_nodes = request.draft_nodes
    if not num_nodes and len(counts) > 1:
        num_nodes = min(sum(counts), max_draft_nodes)
    return DraftPlan(
        method, _proposers(drafters, counts), num_nodes, DraftSize(max(counts), request.draft_nodes)
    )


def _chosen_drafts(
    request: gateway_pb2.GenerateRequest,
    method: str,
    drafters: Mapping[str, drafter_pb2.DrafterInfo],
    verifier: verifier_pb2.VerifierServiceGetInfoResponse,
    *,
    tag: str = "",
) -> DraftPlan:
    """Plan rounds whose sizes the controller chooses, within the limits of drafters, verifier and request.

    Args:
        tag: the method that the sizes name; empty: there is no other.
    """
    if not drafters:
        return DraftPlan(method)
    node_limit = request.draft_nodes or verifier.max_draft_nodes
    limits = [min(limit, node_limit) for limit in _limits(drafters, verifier.max_draft_nodes)]
    start = max(
        min(drafter.default_draft_depth, limit)
        for drafter, limit in zip(drafters.values(), limits, strict=True)
    )
    can_branch = all(drafter.max_draft_nodes for drafter in drafters.values())
    trees = [nodes for nodes in _NODE_BUDGETS if nodes < node_limit]
    if request.draft_nodes:
        trees.append(request.draft_nodes)
    size = DraftSize(start, request.draft_nodes, method=tag)
    return DraftPlan(
        method,
        _proposers(drafters, limits),
        node_limit if can_branch or len(drafters) > 1 else 0,
        size,
        candidates=(
            Candidate(
                method,
                size,
                longest=max(limits),
                budgets=(0, *trees) if can_branch else (0,),
                shares_processor=_share_a_processor(verifier, drafters.values()),
            ),
        ),
        is_offered=all(drafter is not _UNKNOWN_DRAFTER for drafter in drafters.values()),
    )


def _share_a_processor(
    verifier: verifier_pb2.VerifierServiceGetInfoResponse, drafters: Iterable[drafter_pb2.DrafterInfo]
) -> bool:
    """Return whether drafters compute on a CPU, as the verifier does. They may be on another machine, where
    drafts are then taken for dearer than they are, and only under load.
    """
    devices = {drafter.model.device for drafter in drafters}
    return verifier.model.device == _CPU and devices <= {_CPU, ""}


def _settle_method(request: gateway_pb2.GenerateRequest, backends: Backends) -> str:
    """Return the method in effect."""
    method = request.method or backends.default_method
    names = validate_method(method)
    if not request.method or not backends.drafters.is_known or backends.offers(method):
        return method
    unknown = next(name for name in names if name not in backends.known_drafters)
    raise InvalidArgumentError(
        f"Unknown method {unknown!r}; this gateway offers {', '.join(backends.methods)}.",
        field="method",
        reason="UNKNOWN_METHOD",
    )


def _limits(drafters: Mapping[str, drafter_pb2.DrafterInfo], max_draft_nodes: int) -> list[int]:
    """Return the most tokens that each drafter may draft in a row."""
    return [min(max_draft_nodes, drafter.max_draft_depth or max_draft_nodes) for drafter in drafters.values()]


def _proposers(names: Iterable[str], counts: Iterable[int]) -> tuple[Proposer, ...]:
    """Return the drafters and the most that each drafts in a row."""
    return tuple(Proposer(name, count) for name, count in zip(names, counts, strict=True))
