"""The verifier and the drafters of one request: which replicas will do, and sessions on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial, reduce

from gateway.replicas.failover import LastingVerifierSession, Owner, VerifierLease, VerifierReplica
from gateway.replicas.replica import Replica
from gateway.replicas.services import find_drafter
from gateway.replicas.sessions import RemoteDrafterSession, RemoteVerifierSession
from gateway.request.backends import Backends
from gateway.request.drafts import Proposer
from gateway.request.plan import Plan, require_formats
from gateway.rounds.drafting import DraftLink, NoDrafts
from gateway.rounds.link_states import DrafterSession
from gateway.rounds.merging import MergedDrafts, NamedSource
from gateway.rounds.records import DrafterRecords, TrackRecord
from gateway.rounds.vocabulary import Draft, DraftRequest, RequestDrafts
from specdec.contract.errors import InternalError, UnavailableError
from specdec.contract.methods import drafters_of
from specdec.contract.request_id import REQUEST_ID
from specdec.contract.target_state import TargetStateSpec
from specdec.service.auth import caller_key
from specdec.transport.handshake import make_handshake
from specdec.v1 import common_pb2, drafter_pb2, verifier_pb2

DrafterReplica = Replica[drafter_pb2.DrafterServiceGetInfoResponse]

OTHER_WEIGHTS = "it is ready, but runs another model or revision, or takes no output format"
"""Why a verifier cannot go on with another verifier's answer."""


class Peers:
    """Opens a request's sessions: on its first verifier, on those it goes on with, and on its drafters.

    Args:
        first: lease of the replica the request starts on; the caller ends it in any case.
        timeout_s: what is left of the request's deadline; None: it has none.
    """

    def __init__(self, plan: Plan, backends: Backends, first: VerifierLease, timeout_s: float | None) -> None:
        self._plan = plan
        self._backends = backends
        self._first = first
        self.verifier = first.replica
        """The replica the request starts on."""
        self._verifier_uri = first.replica.uri
        """Address of the verifier that runs it now."""
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._state_specs = self._find_state_specs()
        """What each drafter that reads the target's state needs of it, by name, in the method's order."""
        specs = list(self._state_specs.values())
        self._state_spec = reduce(TargetStateSpec.union, specs) if specs else None
        """What all of them need together; None: there are none, or they are not known yet."""
        self.records = {
            proposer.drafter: DrafterRecords(partial(self._records_of, proposer.drafter))
            for proposer in plan.drafting.proposers
        }
        """How often the replicas of each of the request's drafters were right, by name."""

    def verifier_session(self, owner: Owner) -> LastingVerifierSession:
        """Return a session that goes on elsewhere whenever its verifier is lost or preempts it, and tells its
        owner."""
        assert self.verifier.info is not None
        model = self.verifier.info.model
        return LastingVerifierSession(
            self._first,
            self._connect_verifier,
            partial(
                self._backends.verifiers.pick,
                partial(can_run, self._plan, model),
                unsuited=OTHER_WEIGHTS,
            ),
            prompt_token_ids=self._plan.prompt_token_ids,
            wait_s=self._backends.config.failover_wait_s,
            owner=owner,
        )

    @property
    def _left_s(self) -> float | None:
        """What is left of the request's deadline, seconds."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def _connect_verifier(
        self, verifier: VerifierReplica, committed_token_ids: Sequence[int]
    ) -> RemoteVerifierSession:
        timeout_s = self._left_s
        message = self._verify_open(verifier, committed_token_ids)
        self._verifier_uri = verifier.uri
        readers = tuple(self._state_specs)
        return RemoteVerifierSession(
            verifier.calls,
            verifier.uri,
            message,
            timeout_s,
            readers,
            on_load=verifier.load.told,
            round_timeout_s=self._backends.config.round_timeout_s,
        )

    def _verify_open(
        self, verifier: VerifierReplica, committed_token_ids: Sequence[int]
    ) -> verifier_pb2.VerifyOpen:
        plan, info = self._plan, verifier.info
        prompt_length = len(plan.prompt_token_ids)
        assert info is not None
        require_formats(plan.output_format, info)
        return verifier_pb2.VerifyOpen(
            handshake=make_handshake(info.model.model_id, self._backends.codec.vocabulary_fingerprint),
            committed_token_ids=committed_token_ids,
            prompt_length=prompt_length,
            sampling=plan.sampling.to_proto(),
            stop_token_ids=plan.stop_token_ids,
            ignore_eos=plan.ignore_eos,
            max_new_tokens=plan.max_new_tokens + prompt_length - len(committed_token_ids),
            num_top_logprobs=plan.num_top_logprobs,
            target_state_spec=self._state_spec.to_proto() if self._state_spec else None,
            drafter_state_specs=[spec.to_proto() for spec in self._state_specs.values()],
            draft_nodes=plan.drafting.num_reserved_nodes,
            request_id=REQUEST_ID.get(),
            caller_key=caller_key(),
            cache_salt=plan.cache_salt,
            output_format=plan.output_format.to_proto() if plan.output_format else None,
        )

    async def enter_draft_source(self, stack: AsyncExitStack, first_method: str) -> RequestDrafts:
        """Return the source of the request's drafts, which lives until the stack is closed.

        Args:
            first_method: the method whose drafters are opened at once; empty: all are.
        """
        drafting = self._plan.drafting
        at_once = drafters_of(first_method) if first_method else self.records
        sources = [
            NamedSource(
                proposer.drafter,
                await stack.enter_async_context(self._link(proposer, proposer.drafter in at_once)),
                proposer.draft_depth,
            )
            for proposer in drafting.proposers
            if proposer.draft_depth
        ]
        if len(sources) > 1 or first_method:
            return await stack.enter_async_context(MergedDrafts(sources, drafting.draft_nodes))
        return sources[0].source if sources else NoDrafts()

    def _records_of(self, name: str) -> list[TrackRecord]:
        """Return the records of the replicas that can draft for the request now."""
        replicas = self._backends.drafters.fitting(partial(self._fits, name))
        return [self._backends.controller.record(name, replica) for replica in replicas]

    def _link(self, proposer: Proposer, opens_at_once: bool) -> DraftLink:
        assert self.verifier.info is not None
        # A client may have made the name up while no drafter service was there to deny it.
        is_known = proposer.drafter in self._backends.known_drafters
        return DraftLink(
            partial(self._connect_drafter, proposer.drafter),
            self._plan.prompt_token_ids,
            vocab_size=self.verifier.info.model.vocab_size,
            timeout_s=self._backends.config.draft_timeout_s,
            drafter=proposer.drafter if is_known else "unknown",
            records=self.records[proposer.drafter],
            # Who sets a size gets it in every round.
            may_pause=bool(self._plan.drafting.candidates),
            opens_at_once=opens_at_once,
        )

    async def _connect_drafter(self, name: str, committed_token_ids: Sequence[int]) -> DrafterSession:
        """Open a session on a replica that offers the drafter, by preference beside the verifier."""
        replica = self._pick_drafter(name)
        assert replica.info is not None
        drafter = find_drafter(replica.info, name)
        assert drafter is not None
        session = RemoteDrafterSession(replica.calls, self._left_s, drafter, replica.load.told)
        record = self._backends.controller.record(name, replica)
        leased = LeasedDrafterSession(session, replica, record)
        try:
            with leased.blaming():
                await session.open(self._draft_open(name, committed_token_ids))
        except BaseException:
            await leased.close()
            raise
        leased.opened()
        return leased

    def _pick_drafter(self, name: str) -> DrafterReplica:
        """Return a replica that offers the drafter; one that is never right only where there is no other.

        Raises:
            UnavailableError: none is ready.
        """
        suits = partial(self._fits, name)
        drafters, controller = self._backends.drafters, self._backends.controller
        paused = [one for one in drafters.fitting(suits) if controller.record(name, one).is_paused]
        with suppress(UnavailableError):
            return drafters.pick(suits, near=self._verifier_uri, without=paused)
        return drafters.pick(suits, near=self._verifier_uri)

    def _draft_open(self, name: str, committed_token_ids: Sequence[int]) -> drafter_pb2.DraftOpen:
        plan = self._plan
        return drafter_pb2.DraftOpen(
            handshake=make_handshake(vocabulary_fingerprint=self._backends.codec.vocabulary_fingerprint),
            drafter=name,
            committed_token_ids=committed_token_ids,
            prompt_length=len(plan.prompt_token_ids),
            sampling=plan.sampling.to_proto(),
            max_length=len(plan.prompt_token_ids) + plan.max_new_tokens,
            min_draft_confidence=plan.min_draft_confidence,
            request_id=REQUEST_ID.get(),
            caller_key=caller_key(),
            cache_salt=plan.cache_salt,
        )

    def _find_state_specs(self) -> dict[str, TargetStateSpec]:
        specs: dict[str, TargetStateSpec] = {}
        for proposer in self._plan.drafting.proposers:
            infos = self._backends.drafters.known_infos
            found = (find_drafter(info, proposer.drafter) for info in infos)
            if spec := _state_spec(next((drafter for drafter in found if drafter), None)):
                specs[proposer.drafter] = spec
        return specs

    def _fits(self, name: str, info: drafter_pb2.DrafterServiceGetInfoResponse) -> bool:
        """Return whether a drafter service has the drafter and reads what this session's verifier exports."""
        drafter = find_drafter(info, name)
        if drafter is None:
            return False
        spec, session = _state_spec(drafter), self._state_spec
        return spec is None or (session is not None and session.serves(spec))


class LeasedDrafterSession:
    """A drafter session that counts against its replica until it is closed."""

    def __init__(self, session: RemoteDrafterSession, replica: DrafterReplica, record: TrackRecord) -> None:
        self.record = record
        self._lease = replica.lease()
        self.opened = self._lease.opened
        self.reads_target_state = session.reads_target_state
        self._session = session

    async def propose(self, new_token_ids: Sequence[int], request: DraftRequest) -> Draft:
        """Guess what follows, after `new_token_ids` were committed since the last call."""
        with self.blaming():
            draft = await self._session.propose(new_token_ids, request)
        self._lease.replica.succeeded()
        return draft

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Take note of a defect of the replica within the block: after a few it rests, and others draft."""
        try:
            yield
        except InternalError:
            self._lease.replica.failed()
            raise

    async def close(self) -> None:
        """End the session."""
        try:
            await self._session.close()
        finally:
            self._lease.end()


def is_same_model(model: common_pb2.ModelInfo, info: verifier_pb2.VerifierServiceGetInfoResponse) -> bool:
    """Return whether a verifier would go on as one of that model does: known revisions are compared."""
    revisions = {model.revision, info.model.revision} - {""}
    return info.model.model_id == model.model_id and len(revisions) <= 1


def can_run(
    plan: Plan, model: common_pb2.ModelInfo, info: verifier_pb2.VerifierServiceGetInfoResponse
) -> bool:
    """Return whether a verifier would answer a request as one of that model does, in the request's format."""
    takes_format = info.takes_output_formats or plan.output_format is None
    return takes_format and is_same_model(model, info)


def _state_spec(drafter: drafter_pb2.DrafterInfo | None) -> TargetStateSpec | None:
    """Return what a drafter reads of the target."""
    if drafter is None or not drafter.HasField("target_state_spec"):
        return None
    return TargetStateSpec.from_proto(drafter.target_state_spec)
