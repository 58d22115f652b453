"""One benchmark from its configuration to its files: it sets contenders up, runs them and writes figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from specdec.bench.backends import GatewayBackend
from specdec.bench.journal import Journal, key_of
from specdec.bench.peers.engines import OPENVINO, PeerSetup, PeerTarget, names_of, require_known
from specdec.bench.provenance import collect
from specdec.bench.records import (
    MEMORY_MARK,
    METHOD_SEPARATOR,
    NODES_SEPARATOR,
    Contender,
    RequestRecord,
)
from specdec.bench.report import write_results
from specdec.bench.run import run, schedule, warm_up
from specdec.bench.stats import Row, TurnRow, compute_rows, compute_turn_rows
from specdec.bench.workload import (
    DEFAULT_PROMPTS,
    Prompt,
    load_prompts,
    name_of,
    select_round_robin,
    sha256_of,
)
from specdec.client import AsyncClient, GatewayInfo, GenerateOptions, ModelInfo
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.contract.methods import PLAIN, drafters_of
from specdec.contract.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What a benchmark runs; `validate` refuses what cannot run."""

    methods: tuple[str, ...] = ("ngram",)
    """Methods to compare; `none` is always run, named or not."""
    prompts_paths: tuple[Path, ...] = (DEFAULT_PROMPTS,)
    """Files of the workload in Spec-Bench's JSONL form."""
    limit: int | None = None
    """Number of prompts to use, round-robin over the categories; None: all."""
    num_turns: int = 1
    """Most user turns of a prompt that are asked, each after the model's own answer to the one before."""
    num_asks: int = 1
    """How often every prompt is asked."""
    memory: bool = False
    """Run every method once more with what its drafters remember, as METHOD:memory in the results."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """Softmax temperature, >= 0; 0 is greedy."""
    seed: int = 0
    """Seed of the sampling noise, the same for every prompt."""
    draft_depth: tuple[int, ...] = ()
    """Most draft tokens of a round in a row (K); empty: each drafter's default. Every method runs with each
    of several, and is named METHOD@K in the results."""
    draft_nodes: tuple[int, ...] = ()
    """Most tokens of a draft tree; empty, or 0: a chain per drafter. Every method runs with each of several,
    and is named METHOD/N in the results."""
    concurrencies: tuple[int, ...] = (1,)
    """Numbers of requests under way at a time; the workload runs once for each."""
    peers: tuple[str, ...] = ()
    """Engines to compare with at concurrency 1, each plain and with prompt lookup."""
    model: str = "default"
    """The verifier's model, as its command line names it; the peers load the same."""
    num_warmup_prompts: int = 1
    """Number of prompts that every contender answers before the run, unrecorded."""

    @property
    def sampling(self) -> SamplingParams:
        """How every method picks tokens."""
        return SamplingParams(temperature=self.temperature, seed=self.seed)

    @property
    def gateway_methods(self) -> tuple[str, ...]:
        """`none`, then the other methods in the order given, each once."""
        return tuple(dict.fromkeys((PLAIN, *self.methods)))

    def options(self, method: str, draft_depth: int | None = None, draft_nodes: int = 0) -> GenerateOptions:
        """Return the options of a request of a method."""
        return GenerateOptions(
            method=method,
            draft_depth=draft_depth,
            draft_nodes=draft_nodes,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )

    def contenders(self, client: AsyncClient) -> list[Contender]:
        """Return every method without and with memory, with every node budget and every K."""
        made = [Contender(PLAIN, GatewayBackend(client, self.options(PLAIN)))]
        budgets = dict.fromkeys(self.draft_nodes) or (0,)
        lengths = dict.fromkeys(self.draft_depth) or (None,)
        memory = (False, True) if self.memory else (False,)
        settings = product(self.gateway_methods[1:], memory, budgets, lengths)
        for method, has_memory, num_nodes, num_tokens in settings:
            name = method + (MEMORY_MARK if has_memory else "")
            if len(budgets) > 1:
                name += f"{NODES_SEPARATOR}{num_nodes}"
            if len(lengths) > 1:
                name += f"{METHOD_SEPARATOR}{num_tokens}"
            backend = GatewayBackend(client, self.options(method, num_tokens, num_nodes))
            made.append(Contender(name, backend, has_memory=has_memory))
        return made

    def load_prompts(self) -> list[Prompt]:
        """Load the prompts of the run, in its order.

        Raises:
            InvalidArgumentError: the workload is malformed, or has not a prompt of as many turns.
        """
        prompts = select_round_robin(load_prompts(*self.prompts_paths), self.limit)
        if all(len(prompt.later_turns) < self.num_turns - 1 for prompt in prompts):
            raise InvalidArgumentError(
                f"None of the prompts has {self.num_turns} turns; ask for fewer, or name another file.",
                field="turns",
            )
        return [replace(prompt, later_turns=prompt.later_turns[: self.num_turns - 1]) for prompt in prompts]

    def validate(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InvalidArgumentError: naming the value and what it must be.
        """
        self.sampling.validate()
        if self.draft_depth and min(self.draft_depth) < 1:
            raise InvalidArgumentError("draft-depth must be integers >= 1, such as 4 or 3,7,15.")
        if self.draft_nodes and min(self.draft_nodes) < 0:
            raise InvalidArgumentError("draft-nodes must be integers >= 0, such as 32 or 0,16,32.")
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise InvalidArgumentError("concurrency must be a list of integers >= 1, such as 1,4,8.")
        if self.num_turns < 1 or self.num_asks < 1:
            raise InvalidArgumentError("turns and asks must be integers >= 1.")
        require_known(self.peers)
        if self.peers and self.num_turns > 1:
            raise InvalidArgumentError("Peers answer single turns; leave out --peers or --turns.")
        if self.peers and 1 not in self.concurrencies:
            raise InvalidArgumentError("Peers answer one request at a time; add 1 to the concurrencies.")
        if OPENVINO in self.peers and self.temperature:
            raise InvalidArgumentError(f"{OPENVINO} is compared greedily; use --temperature 0 with it.")
        if clash := set(names_of(self.peers)) & set(self.methods):
            raise InvalidArgumentError(f"{clash.pop()} is a peer; name it in --peers, not in --methods.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    rows: list[Row]
    turn_rows: list[TurnRow]
    records: list[RequestRecord]
    provenance: dict[str, Any]


def run_experiment(
    config: BenchConfig,
    prompts: Sequence[Prompt],
    gateway: str,
    directory: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None,
    *,
    resume: bool = False,
) -> Outcome:
    """Run against a gateway; write results.json and table.md, and requests.jsonl as requests end.

    Args:
        config: what to run; it is valid.
        prompts: prompts from `BenchConfig.load_prompts`.
        gateway: address of the gateway.
        directory: folder for the files, which is made if it does not exist.
        on_progress: called with the number of requests done and of all requests.
        report: receives a line of text before a slow step.
        resume: whether to go on where a run with the same settings was interrupted in that folder.

    Raises:
        SpecdecError: the configuration does not fit the gateway, or is not that of the run to go on with.
            Requests that fail raise nothing.
    """
    provenance = collect() | _describe(config, len(prompts))
    settings = _describe(config, len(prompts)) | {
        "methods": config.gateway_methods,
        "concurrencies": config.concurrencies,
        "peers": config.peers,
        "commit": provenance["commit"],
    }
    journal = Journal(directory, resume=resume)
    measured, records = asyncio.run(
        _measure(config, prompts, gateway, settings, journal, on_progress, report)
    )
    provenance |= measured
    outcome = Outcome(compute_rows(records), compute_turn_rows(records), records, provenance)
    write_results(directory, provenance, outcome.rows, outcome.turn_rows, records)
    return outcome


async def _measure(
    config: BenchConfig,
    prompts: Sequence[Prompt],
    gateway: str,
    settings: dict[str, Any],
    journal: Journal,
    on_progress: Callable[[int, int], None],
    report: Callable[[str], None],
) -> tuple[dict[str, Any], list[RequestRecord]]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(gateway))
        target = _check(config, await client.info())
        provenance: dict[str, Any] = {
            "model": target.model_id,
            "dtype": target.dtype,
            "device": target.device,
        }
        contenders = config.contenders(client)
        if config.peers:
            peers = PeerSetup(PeerTarget(config.model, target.model_id, target.dtype, target.device), report)
            prompts = await _encode(peers, prompts)
            backends = await peers.start_answering(config.peers, config.options(PLAIN), stack)
            contenders += [Contender(each.name, each, is_concurrent=False) for each in backends]
            provenance["peers"] = {backend.name: backend.description for backend in backends}
        blocks = list(schedule(contenders, prompts, config.concurrencies, config.num_asks))
        target_settings = {name: provenance[name] for name in ("model", "dtype", "device")}
        kept = journal.begin(settings | target_settings, blocks)
        done = {(record.method, record.concurrency, record.pair) for record in kept}
        if done:
            provenance["num_requests_before"] = len(kept)
            report(f"{len(kept)} requests were measured before; {len(blocks) - len(done)} blocks are left.")
        left = [block for block in blocks if key_of(block) not in done]
        if left:
            await warm_up(contenders, prompts[: config.num_warmup_prompts])
        records = kept + await run(left, journal.keep, on_progress)
        place = {key_of(block): number for number, block in enumerate(blocks)}
        return provenance, sorted(records, key=lambda each: place[each.method, each.concurrency, each.pair])


def _check(config: BenchConfig, info: GatewayInfo) -> ModelInfo:
    """Return the target model if the gateway can run what the configuration asks for.

    Raises:
        SpecdecError: it cannot.
    """
    if info.model is None:
        raise UnavailableError(
            "No verifier has been ready at this gateway yet; try again when it has loaded."
        )
    named = [name for method in config.methods for name in drafters_of(method)]
    unknown = [name for name in named if name not in info.methods]
    if unknown:
        raise InvalidArgumentError(
            f"The gateway has no method {unknown[0]!r}; it has {', '.join(info.methods)}.", field="method"
        )
    return info.model


async def _encode(peers: PeerSetup, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with the token ids that every engine gets, the gateway included."""
    encoded = await peers.encode([prompt.text for prompt in prompts])
    return [replace(prompt, token_ids=ids) for prompt, ids in zip(prompts, encoded, strict=True)]


def _describe(config: BenchConfig, num_prompts: int) -> dict[str, Any]:
    return {
        "prompts": ", ".join(map(name_of, config.prompts_paths)),
        "prompts_sha256": sha256_of(config.prompts_paths),
        "num_prompts": num_prompts,
        "num_turns": config.num_turns,
        "num_asks": config.num_asks,
        "memory": config.memory,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "draft_depth": config.draft_depth,
        "draft_nodes": config.draft_nodes,
    }
