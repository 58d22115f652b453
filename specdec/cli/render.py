"""What the command line shows: answers as they come, statistics, tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table

from specdec.client import (
    DrafterServiceInfo,
    GatewayInfo,
    Generation,
    ModelInfo,
    ReplicaInfo,
    Speculation,
    Token,
    VerifierInfo,
)
from specdec.client.gateway_info import StateLinkInfo

DRAFT_STYLE = Style(color="green")
"""Colour of tokens that the drafter proposed and the target accepted."""

_MAX_SHOWN_DEPTH = 8
_REVISION_DIGITS = 8
_NOTABLE_WAIT_MS = 10.0

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(no_color: bool = False, *, stderr: bool = False) -> Console:
    """Make a console on a standard stream. $NO_COLOR turns its colours off as well."""
    return Console(stderr=stderr, no_color=no_color or None, highlight=False)


class AnswerPrinter:
    """Prints an answer token by token: coloured by origin in a terminal, exact bytes elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = "\n"

    def add(self, token: Token) -> None:
        """Print one token's text."""
        if not token.text:
            return
        text = token.text
        if self._console.is_terminal:
            # A model must not be able to send escape sequences to the user's terminal.
            text = _CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
        # Segments are printed as they are; a string would have its tabs expanded, from column 0.
        segment = Segment(text, DRAFT_STYLE if token.is_draft else None)
        self._console.print(Segments([segment]), crop=False, soft_wrap=True, end="")
        self._last = text[-1]

    def end(self) -> None:
        """End the answer's last line."""
        if self._last != "\n":
            self._console.out("", highlight=False)


def closing_line(generation: Generation) -> str:
    """Return speed and acceptance of an answer in a line, with the seed that gives it again if picks were
    random; a second line follows if the drafter failed meanwhile, or is never right.
    """
    speculation, timing = generation.speculation, generation.timing
    parts = [
        f"{generation.usage.output_tokens} tokens, {format_rate(generation)} tokens/s",
        f"method {_method(speculation)}",
        f"acceptance length {speculation.mean_acceptance_length:.2f}",
        f"{speculation.num_rounds} rounds",
        f"TTFT {timing.ttft_ms:.0f} ms",
    ]
    if timing.waiting_ms >= _NOTABLE_WAIT_MS:
        parts.append(f"waited {timing.waiting_ms:.0f} ms for room")
    if generation.seed is not None:
        parts.append(f"seed {generation.seed}")
    line = " | ".join(parts)
    if _is_tree(speculation):
        line += f"\n{tree_line(speculation)}"
    note = fallback_note(generation)
    return f"{line}\nnote: {note}" if note else line


def _method(speculation: Speculation) -> str:
    """Return the method, and where it was chosen by the round, how many rounds had which."""
    rounds = ", ".join(f"{each.method} {each.num_rounds}" for each in speculation.methods)
    return f"{speculation.method} ({rounds})" if rounds else speculation.method


def fallback_note(generation: Generation) -> str:
    """Return how often an answer went without a draft it should have had, and why, or what is wrong with the
    drafter all the same; empty: nothing is.
    """
    speculation = generation.speculation
    if speculation.proposers:
        return _missing_proposers(speculation)
    if not speculation.num_fallback_rounds:
        return speculation.fallback_reason
    reason = speculation.fallback_reason or "the drafter was lost"
    return (
        f"{speculation.num_fallback_rounds} of {speculation.num_rounds} rounds went without a draft, the "
        f"commonest reason: {reason}"
    )


def _missing_proposers(speculation: Speculation) -> str:
    """Return the note for several drafters. Those of a service are lost together: each reason comes once."""
    missing: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    for proposer in speculation.proposers:
        if proposer.num_fallback_rounds:
            counts = missing.setdefault(proposer.fallback_reason, [])
            counts.append(f"{proposer.num_fallback_rounds} without {proposer.drafter}")
        elif proposer.fallback_reason:
            asked.setdefault(proposer.fallback_reason, []).append(proposer.drafter)
    notes = [f"of {speculation.num_rounds} rounds {_by_reason(missing)}"] if missing else []
    return "; ".join([*notes, _by_reason(asked)] if asked else notes)


def _by_reason(parts: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(those)}: {reason}" for reason, those in parts.items())


def _is_tree(speculation: Speculation) -> bool:
    """Return whether a round drafted several continuations, or several drafters drafted."""
    num_deepest = sum(speculation.num_draft_tokens_per_position)
    return bool(speculation.proposers) or speculation.num_draft_tokens > num_deepest


def tree_line(speculation: Speculation) -> str:
    """Return what draft trees cost and gave, and which of several drafters it came from."""
    depths = ", ".join(f"{share:.0%}" for share in speculation.acceptance_by_depth[:_MAX_SHOWN_DEPTH])
    parts = [f"{speculation.draft_tokens_per_token:.1f} draft tokens per token"]
    if depths:
        parts.append(f"accepted by depth {depths}")
    if speculation.num_accepted_tokens:
        shares = [
            f"{proposer.drafter} {proposer.num_accepted_tokens / speculation.num_accepted_tokens:.0%} "
            f"({proposer.num_sole_accepted_tokens / speculation.num_accepted_tokens:.0%} it alone)"
            for proposer in speculation.proposers
        ]
        if shares:
            parts.append(f"of the accepted tokens {'; '.join(shares)}")
    return "trees: " + " | ".join(parts)


def print_closing_line(generation: Generation, no_color: bool) -> None:
    """Print the closing line of an answer, apart from the answer."""
    console(no_color, stderr=True).out(closing_line(generation), style="dim", highlight=False)


def format_rate(generation: Generation) -> str:
    """Return output tokens per second of the whole request, one decimal; "-" if no time was measured."""
    total_s = generation.timing.total_ms / 1000
    return f"{generation.usage.output_tokens / total_s:.1f}" if total_s else "-"


def comparison_table(answers: Sequence[tuple[str, Generation]]) -> Table:
    """Return a table, a row per method; speedup and agreement are over `none`, else the first method."""
    base_method, base = next((pair for pair in answers if pair[0] == "none"), answers[0])
    table = Table(title=f"Compared with {base_method}")
    table.add_column("method", overflow="fold", min_width=max(len(method) for method, _ in answers))
    for header in ("seconds", "tok/s", "speedup", "acceptance length", "rounds"):
        table.add_column(header, justify="right")
    table.add_column("text")
    for method, answer in answers:
        table.add_row(
            method,
            f"{answer.timing.total_ms / 1000:.2f}",
            format_rate(answer),
            _speedup(base, answer),
            f"{answer.speculation.mean_acceptance_length:.2f}",
            str(answer.speculation.num_rounds),
            agreement(base, answer),
        )
    return table


def _speedup(base: Generation, answer: Generation) -> str:
    if not (base.timing.tpot_ms and answer.timing.tpot_ms):
        return "-"
    return f"{base.timing.tpot_ms / answer.timing.tpot_ms:.2f}x"


def agreement(base: Generation, answer: Generation) -> str:
    """Return "same", or the index of the first output token that differs."""
    if base.token_ids == answer.token_ids:
        return "same"
    pairs = zip(base.token_ids, answer.token_ids, strict=False)
    shorter = min(len(base.token_ids), len(answer.token_ids))
    index = next((index for index, (left, right) in enumerate(pairs) if left != right), shorter)
    return f"differs from token {index}"


def info_tables(info: GatewayInfo) -> list[Table]:
    """Return tables of the system, its drafters and its replicas."""
    system = Table(title="System", show_header=False)
    model = info.model
    system.add_row("model", model.model_id if model else "none ready")
    if model:
        system.add_row("weights", f"{model.dtype} on {model.device}")
        system.add_row("model code", model.model_impl or "not known")
        system.add_row("revision", model.revision or "not known")
        system.add_row("context", f"{model.max_length} tokens" if model.max_length else "no limit")
        system.add_row("vocabulary", f"{model.vocab_size} tokens, {model.vocabulary_fingerprint[:12]}")
    system.add_row("methods", ", ".join(info.methods))
    system.add_row("default", f"{info.default_method}, {info.default_max_new_tokens} new tokens")
    system.add_row("protocol", str(info.protocol_version))
    return [system, _replica_table(info)]


def _replica_table(info: GatewayInfo) -> Table:
    table = Table(title="Replicas")
    for header in ("service", "address", "state", "sessions", "runs"):
        table.add_column(header)
    for kind, replicas in (("verifier", info.verifiers), ("drafter", info.drafters)):
        for replica in replicas:
            state = "ready" if replica.ready else f"not ready: {replica.reason or 'no answer yet'}"
            table.add_row(kind, replica.uri, state, _sessions(replica), _runs(replica))
    return table


def _sessions(replica: ReplicaInfo) -> str:
    if replica.info is None:
        return "-"
    waiting = f", {replica.info.load.num_waiting} items wait" if replica.info.load.num_waiting else ""
    return f"{replica.info.num_sessions} of {replica.info.max_sessions}{waiting}"


def _runs(replica: ReplicaInfo) -> str:
    match replica.info:
        case VerifierInfo() as verifier:
            return (
                f"{_weights(verifier.model)}, K up to "
                f"{verifier.max_draft_nodes}, KV {verifier.kv_free_tokens} of "
                f"{verifier.kv_capacity_tokens} tokens free\ntarget state offered by {_state_offer(verifier)}"
            )
        case DrafterServiceInfo() as service:
            drafters = ", ".join(
                f"{drafter.name} (K {drafter.default_draft_depth}, up to {drafter.max_draft_depth}"
                f"{'' if drafter.max_draft_nodes else ', chains only'})"
                for drafter in service.drafters
            )
            return "\n".join([drafters, *map(_state_link, service.state_links)])
    return "-"


def _weights(model: ModelInfo | None) -> str:
    if model is None:
        return "-"
    revision = model.revision[:_REVISION_DIGITS]
    return f"{model.model_id} ({revision})" if revision else model.model_id


_STORAGE_NAMES = {"shared_memory": "handle (shared memory)", "cuda_ipc": "handle (CUDA IPC)"}


def _state_offer(verifier: VerifierInfo) -> str:
    """Return how a verifier's target state is read, and by how many sessions now."""
    offer = _STORAGE_NAMES.get(verifier.state_storage, "stream only")
    return f"{offer}; {verifier.num_state_sessions} sessions export it, {verifier.num_state_streams} streams"


def _state_link(link: StateLinkInfo) -> str:
    how = _STORAGE_NAMES.get(link.storage, "stream")
    reason = f": {link.fallback_reason}" if link.fallback_reason else ""
    return f"reads {link.verifier_uri} by {how}{reason} ({link.num_sessions} sessions)"
