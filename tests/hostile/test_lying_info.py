"""A drafter service that lies about itself: it is not used, or costs its requests their drafts only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.v1 import drafter_pb2, target_state_pb2
from tests.hostile.liar import NAME, Liar
from tests.hostile.scene import Honest, scene_of
from tests.raw_streams import until
from tests.refusals import shared

Info = drafter_pb2.DrafterServiceGetInfoResponse
Spec = target_state_pb2.TargetStateSpec
MOST = 2**32 - 1


class SaysOfItself(Liar):
    """Describes its drafter by `fields`, after a first honest answer if it `changes`."""

    def __init__(self, *, changes: bool = False, **fields: Any) -> None:
        super().__init__()
        self._fields, self._changes, self._num_asked = fields, changes, 0

    def info(self) -> Any:
        self._num_asked += 1
        is_honest = self._changes and self._num_asked % 2
        return Info(
            protocol_version=PROTOCOL_VERSION, drafters=[self.drafter(**({} if is_honest else self._fields))]
        )


class Says(Liar):
    """Answers GetInfo with a message of its own."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def info(self) -> Any:
        return self._answer


class TurnsUnreadable(Liar):
    """Answers GetInfo once as it should, then with bytes that are not a message."""

    def info(self) -> Any:
        self.num_asked = getattr(self, "num_asked", 0) + 1
        return super().info() if self.num_asked == 1 else b"\xff" * 100


class SaysNothing(Liar):
    async def _get_info(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(60)


class Health(health_pb2_grpc.HealthServicer):
    """Reports `statuses` over and over, hundreds of times a second."""

    def __init__(self, *statuses: int) -> None:
        self._statuses = statuses

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        while True:
            for status in self._statuses:
                await context.write(health_pb2.HealthCheckResponse(status=status))  # type: ignore[arg-type]
                await asyncio.sleep(0.005)


class Unhealthy(Liar):
    def __init__(self, *statuses: int) -> None:
        super().__init__()
        self._health = Health(*statuses)

    def health(self) -> health_pb2_grpc.HealthServicer:
        return self._health


def projection(**fields: Any) -> Spec:
    right = {
        "sha256": "0" * 64,
        "input_size": 32,
        "output_size": 32,
        "norm_epsilon": 1e-6,
        "dtype": "float32",
    }
    return Spec(hidden_layer_ids=[0], projection=target_state_pb2.Projection(**(right | fields)))


def drafters(*names: str) -> Info:
    return Info(
        protocol_version=PROTOCOL_VERSION, drafters=[drafter_pb2.DrafterInfo(name=name) for name in names]
    )


USED: dict[str, Callable[[], Liar]] = {
    "absurd limits": lambda: SaysOfItself(
        max_draft_depth=MOST, default_draft_depth=MOST, max_draft_nodes=MOST
    ),
    "a hundred layers": lambda: SaysOfItself(target_state_spec=Spec(hidden_layer_ids=range(100))),
    "one layer ten thousand times": lambda: SaysOfItself(
        target_state_spec=Spec(hidden_layer_ids=[0] * 10_000)
    ),
    "KV ten thousand times": lambda: SaysOfItself(target_state_spec=Spec(kv_layer_ids=[0] * 10_000)),
    "layers past all numbers": lambda: SaysOfItself(target_state_spec=Spec(kv_layer_ids=[MOST])),
    "an empty spec": lambda: SaysOfItself(target_state_spec=Spec()),
    "a projection to anywhere": lambda: SaysOfItself(target_state_spec=projection(output_size=MOST)),
    "a projection of ten thousand layers": lambda: SaysOfItself(
        target_state_spec=Spec(
            hidden_layer_ids=[0] * 10_000, projection=projection(input_size=320_000).projection
        )
    ),
    "a projection of no type": lambda: SaysOfItself(target_state_spec=projection(dtype="\0")),
    "a spec that changes": lambda: SaysOfItself(
        changes=True, target_state_spec=Spec(hidden_layer_ids=[3, 2, 1, 0], last_hidden_state=True)
    ),
    "a name that changes": lambda: SaysOfItself(changes=True, name="none"),
    "a description that cannot be read any more": TurnsUnreadable,
    "a description that grows": lambda: SaysOfItself(changes=True, family="x" * 1_000_000),
}
"""Services that are used all the same."""

REFUSED: dict[str, tuple[Callable[[], Liar], str]] = {
    "no protocol": (lambda: Says(Info()), "protocol version 0"),
    "another protocol": (lambda: Says(Info(protocol_version=99)), "protocol version 99"),
    "thousands of drafters": (lambda: Says(drafters(*map(str, range(20_000)))), "bytes"),
    "a name of megabytes": (lambda: Says(drafters("x" * 5_000_000)), "bytes"),
    "a message above the limit": (lambda: Says(drafters("x" * 20_000_000)), "RESOURCE_EXHAUSTED"),
    "no name": (lambda: Says(drafters("")), "not a name of a drafter"),
    "a name with a meaning": (lambda: Says(drafters("none")), "not a name of a drafter"),
    "two names in one": (lambda: Says(drafters("model+liar")), "not a name of a drafter"),
    "a name for terminals": (lambda: Says(drafters("\x1b[2J")), "not a name of a drafter"),
    "no message": (lambda: Says(b"\xff" * 100), "cannot be read"),
}
"""Services that are not, and what is said of them."""


@shared
@pytest.mark.parametrize("lie", USED)
async def test_a_service_that_lies_about_its_drafter_costs_drafts_only(lie: str, honest: Honest) -> None:
    async with scene_of(USED[lie](), honest) as scene:
        expected = await scene.generate("none")
        for draft_nodes in (0, 12, 0):
            lied_to = await scene.generate(NAME, draft_nodes=draft_nodes, draft_depth=None)
            assert lied_to.token_ids == expected.token_ids
            info = await scene.client.info()
            assert {"model", NAME} <= set(info.methods)
        await scene.assert_clean()


@shared
@pytest.mark.parametrize("lie", REFUSED)
async def test_a_service_that_makes_no_sense_is_not_used(lie: str, honest: Honest) -> None:
    make, reason = REFUSED[lie]
    async with scene_of(make(), honest) as scene:
        info = await scene.client.info()
        assert list(info.methods) == ["none", "auto", "model"]
        assert reason in info.drafters[0].reason
        assert len(info.drafters[0].reason) < 1000
        with pytest.raises(InvalidArgumentError, match="Unknown method 'liar'"):
            await scene.generate(NAME)
        await scene.assert_clean()


MUTE: dict[str, Callable[[], Liar]] = {
    "no answer": SaysNothing,
    "health nobody knows": lambda: Unhealthy(99),
    "no health": lambda: Unhealthy(health_pb2.HealthCheckResponse.NOT_SERVING),
}


@shared
@pytest.mark.parametrize("lie", MUTE)
async def test_a_service_that_never_says_that_it_is_ready_is_not_waited_for(lie: str, honest: Honest) -> None:
    async with scene_of(MUTE[lie](), honest, waits=False) as scene:
        assert list((await scene.client.info()).methods) == ["none", "auto", "model"]
        await scene.assert_clean()


@shared
async def test_a_service_that_goes_up_and_down_all_the_time_is_let_wait(honest: Honest) -> None:
    status = health_pb2.HealthCheckResponse
    liar = Unhealthy(status.SERVING, status.NOT_SERVING)
    async with scene_of(liar, honest) as scene:
        replica = scene.gateway.generations.backends.drafters.replicas[0]
        await until(lambda: replica.info is not None, timeout_s=20)
        expected = await scene.generate("none")
        assert (await scene.generate(NAME)).token_ids == expected.token_ids
        changes, ready = 0, replica.is_ready
        for _ in range(100):
            await asyncio.sleep(0.01)
            changes += replica.is_ready != ready
            ready = replica.is_ready
        assert changes <= 12, "it is listened to five times a second"
        await scene.assert_clean()
