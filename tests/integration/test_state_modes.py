"""How state goes from verifier to drafter as both are told to, and what a generation does where it cannot."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from rich.console import Console

from specdec.cli.render import info_tables
from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.client.gateway_info import DrafterServiceInfo, GatewayInfo, VerifierInfo
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.target_state import StateStorage, TargetStateSpec
from specdec.runtime.state_files import SharedDirectory
from specdec.transport.channel import aio_channel
from specdec.v1 import drafter_pb2, drafter_pb2_grpc, target_state_pb2, verifier_pb2, verifier_pb2_grpc
from tests.refusals import shared
from tests.small_memory import SmallMemory
from tests.state_probe import StateProbe, all_of, random_projection
from tests.systems import System, running_drafter, running_gateway, running_system, running_verifier
from tests.tiny_models import save_tiny_model

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SPEC = all_of("llama")
PLAIN = GenerateOptions(max_new_tokens=24, ignore_eos=True, method="none")
READING = replace(PLAIN, method="probe", draft_depth=4)
MODES = ("auto", "handle", "stream")
BY_HANDLE, BY_STREAM = StateStorage.SHARED_MEMORY, StateStorage.STREAM

OUTCOMES: Mapping[tuple[str, str], StateStorage | str] = {
    ("auto", "auto"): BY_HANDLE,
    ("auto", "handle"): BY_HANDLE,
    ("auto", "stream"): BY_STREAM,
    ("handle", "auto"): BY_HANDLE,
    ("handle", "handle"): BY_HANDLE,
    ("handle", "stream"): "shares target state by handle only",
    ("stream", "auto"): BY_STREAM,
    ("stream", "handle"): "the verifier offers no handle",
    ("stream", "stream"): BY_STREAM,
}
"""By the modes of verifier and drafter: how state is read, or why it is not."""


class Modes:
    """Verifiers and drafters of every mode."""

    def __init__(self, model: Path, verifiers: dict[str, str], drafters: dict[str, tuple[str, StateProbe]]):
        self.model, self.verifiers, self.drafters = model, verifiers, drafters


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def modes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Modes]:
    here = {"shared_dir": str(tmp_path_factory.mktemp("shared"))}
    async with AsyncExitStack() as stack:
        verifiers, drafters = {}, {}
        for mode in MODES:
            running: Any = running_verifier(tiny_llama, target_state=mode, **here)
            verifiers[mode], _ = await stack.enter_async_context(running)
            probe = StateProbe(SPEC)
            running = running_drafter("probe", families=probe.families, target_state=mode, **here)
            address, _ = await stack.enter_async_context(running)
            drafters[mode] = address, probe
        yield Modes(tiny_llama, verifiers, drafters)


@shared
@pytest.mark.parametrize(("of_verifier", "of_drafter"), OUTCOMES)
async def test_every_pair_of_modes(of_verifier: str, of_drafter: str, modes: Modes) -> None:
    outcome = OUTCOMES[of_verifier, of_drafter]
    drafter_at, probe = modes.drafters[of_drafter]
    async with (
        running_gateway(modes.model, verifier=modes.verifiers[of_verifier], drafter=drafter_at) as (
            address,
            _,
        ),
        AsyncClient(address, timeout_s=60) as client,
    ):
        plain = await client.generate(PROMPT, PLAIN)
        result = await client.generate(PROMPT, READING)
    assert result.token_ids == plain.token_ids
    speculation, session = result.speculation, probe.sessions[-1]
    if isinstance(outcome, StateStorage):
        assert session.storages == {outcome}
        assert len(session.readings) >= speculation.num_rounds - 2
        assert speculation.num_fallback_rounds == 0
    else:
        assert session.readings == []
        assert outcome in speculation.fallback_reason
        assert speculation.num_draft_tokens == 0
        assert speculation.num_fallback_rounds >= speculation.num_rounds - 2


@asynccontextmanager
async def probed_system(
    model: Path, probe: StateProbe, **options: Mapping[str, Any]
) -> AsyncIterator[System]:
    async with running_system(model, "probe", families=probe.families, **options) as system:  # type: ignore[arg-type]
        yield system


async def reading(system: System) -> Generation:
    """Generate by the probe, and check that the output is plain decoding's whatever becomes of the drafts."""
    plain = await system.client.generate(PROMPT, PLAIN)
    result = await system.client.generate(PROMPT, READING)
    assert result.token_ids == plain.token_ids
    return result


PROJECTION = random_projection(2, 32, 48, torch.float32).info


def spec_with(**changes: Any) -> TargetStateSpec:
    """Return a spec whose projection is right except for these fields."""
    return TargetStateSpec((0, 1), projection=replace(PROJECTION, **changes))


UNMET: dict[str, tuple[TargetStateSpec, str]] = {
    "layer past the last": (TargetStateSpec((0, 4)), "layers are 0 to 3"),
    "kv layer past the last": (TargetStateSpec(kv_layer_ids=(4,)), "stores no KV of its own"),
    "kv of a layer that shares": (TargetStateSpec(kv_layer_ids=(2,)), "those that do are 0, 1"),
    "projection of other layers": (TargetStateSpec((0,), projection=PROJECTION), "hidden states are 32"),
    "projection of nothing": (TargetStateSpec((), True, projection=PROJECTION), "hidden states are 0"),
    "projection too large": (spec_with(output_size=5 * 32), "at most 4 times its hidden size"),
    "projection to nothing": (spec_with(output_size=0), "at most 4 times its hidden size"),
    "projection of no such type": (spec_with(dtype="float31"), "bfloat16 or float16 or float32"),
    "projection of what is no type": (spec_with(dtype="nn"), "bfloat16 or float16 or float32"),
    "too many layers": (TargetStateSpec((0, 1, 2)), "--max-hidden-layers"),
    "nothing": (TargetStateSpec(), "names nothing"),
}


@pytest.mark.parametrize("name", UNMET)
async def test_a_target_that_cannot_costs_the_draft_only(name: str, tmp_path: Path) -> None:
    spec, fragment = UNMET[name]
    model = save_tiny_model(tmp_path / "model", "gemma4-shared-kv")
    probe = StateProbe(spec)
    here = {"shared_dir": str(tmp_path)}
    options = {"verifier_options": {**here, "max_hidden_layers": 2}, "drafter_options": here}
    async with probed_system(model, probe, **options) as system:
        result = await reading(system)
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        assert verifier.export.num_sessions == 0
    assert fragment in result.speculation.fallback_reason
    assert result.speculation.num_draft_tokens == 0
    assert not any(session.readings for session in probe.sessions)


async def test_a_mirror_that_does_not_fit_costs_the_draft_only(tiny_llama: Path, tmp_path: Path) -> None:
    probe = StateProbe(SPEC)
    drafter_options = {"target_state": "stream", "mirror_mib": 0.05, "shared_dir": str(tmp_path)}
    verifier_options = {"shared_dir": str(tmp_path)}
    async with probed_system(
        tiny_llama, probe, verifier_options=verifier_options, drafter_options=drafter_options
    ) as system:
        result = await reading(system)
        assert "--mirror-mib" in result.speculation.fallback_reason
        assert probe.sessions[0].readings == []
        drafter, verifier = system.drafter.servicer.host, system.verifier.servicer.verifier
        assert drafter is not None
        assert drafter.reader is not None
        assert verifier is not None
        assert drafter.reader.mirrors.num_used == 0
        assert verifier.export.num_streams == 0


def spoil(root: Path, how: str) -> None:
    """Make the folder of this user's state files unusable."""
    folder = root / f"specdec-{os.getuid()}"
    match how:
        case "others may enter":
            folder.mkdir()
            folder.chmod(0o755)
        case "another's":
            folder.mkdir(mode=0o700)
            if os.getuid():
                pytest.skip("only root can give a folder to another user")
            os.chown(folder, 12345, 12345)
        case "link":
            (root / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(root / "elsewhere")
        case "file":
            folder.touch()


WRONG_FOLDERS = ("others may enter", "another's", "link", "file", "not there")


@pytest.mark.parametrize("how", WRONG_FOLDERS)
async def test_a_shared_directory_that_is_not_ours_is_not_used(
    how: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "shared"
    if how != "not there":
        root.mkdir()
        spoil(root, how)
    strict = {"shared_dir": str(root), "target_state": "handle"}
    with pytest.raises(InvalidArgumentError, match="shared directory") as raised:
        async with running_verifier(tiny_llama, **strict):
            pass
    assert raised.value.field == "shared_dir"
    probe = StateProbe(SPEC)
    with pytest.raises(InvalidArgumentError, match="shared directory"):
        async with running_drafter("probe", families=probe.families, **strict):
            pass
    if how == "others may enter":  # what `auto` makes of it is the same for all
        options = {"shared_dir": str(root)}
        async with probed_system(
            tiny_llama, probe, verifier_options=options, drafter_options=options
        ) as system:
            result = await reading(system)
        assert result.speculation.num_fallback_rounds == 0
        assert probe.sessions[0].storages == {StateStorage.STREAM}
        messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert any("drafters have to stream target state" in message for message in messages)
        assert any("target state has to be streamed" in message for message in messages)
    assert [path for path in entries(tmp_path) if path.name.endswith(".state")] == []


def entries(root: Path) -> list[Path]:
    """Return everything below a folder."""
    return list(root.rglob("*"))


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[SmallMemory]:
    memory = SmallMemory(tmp_path / "small")
    yield memory
    memory.unmount()


KV_KIB = 256


@pytest.mark.parametrize("num_kib", [64, KV_KIB + 32], ids=["no room", "room for KV only"])
async def test_no_room_is_a_warning_and_a_stream(
    num_kib: int,
    small_memory: SmallMemory,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small_memory.mount(num_kib)
    probe = StateProbe(SPEC)
    options = {"shared_dir": str(small_memory.path)}
    async with probed_system(
        tiny_llama,
        probe,
        verifier_options={**options, "kv_cache_mib": KV_KIB / 1024},
        drafter_options=options,
    ) as system:
        result = await reading(system)
        offered = (await system.client.info()).verifiers[0].info
    assert isinstance(offered, VerifierInfo)
    assert offered.state_storage == ("shared_memory" if num_kib > KV_KIB else "stream")
    assert result.speculation.num_fallback_rounds == 0
    assert probe.sessions[0].storages == {StateStorage.STREAM}
    assert len(probe.sessions[0].readings) > 2
    assert f"{small_memory.path}" in caplog.text
    assert "has no room" in caplog.text
    assert "for the embedding and the LM head, and" in caplog.text, "the start says what else was wanted"


@pytest.mark.parametrize("num_kib", [64, KV_KIB], ids=["no room", "room for KV only"])
async def test_no_room_is_an_error_where_handles_are_demanded(
    num_kib: int, small_memory: SmallMemory, tiny_llama: Path
) -> None:
    small_memory.mount(num_kib)
    options = {"shared_dir": str(small_memory.path), "target_state": "handle"}
    with pytest.raises(ResourceExhaustedError, match="name another --shared-dir") as raised:
        async with running_verifier(tiny_llama, kv_cache_mib=KV_KIB / 1024, **options):
            pass
    assert raised.value.reason == "SHARED_MEMORY_FULL"
    # Nothing stays of a start that failed.
    assert entries(small_memory.path) == [SharedDirectory(small_memory.path).path]


async def test_no_room_for_hidden_states_costs_the_draft_only_where_handles_are_demanded(
    small_memory: SmallMemory, tiny_llama: Path
) -> None:
    small_memory.mount(KV_KIB + 32)
    options = {"shared_dir": str(small_memory.path), "target_state": "handle"}
    probe = StateProbe(SPEC)
    verifier_options = {**options, "kv_cache_mib": KV_KIB / 1024}
    async with probed_system(
        tiny_llama, probe, verifier_options=verifier_options, drafter_options=options
    ) as system:
        result = await reading(system)
    assert "name another --shared-dir" in result.speculation.fallback_reason
    assert result.speculation.num_draft_tokens == 0
    assert probe.sessions[0].readings == []


async def info_of(system: System) -> tuple[Any, Any]:
    """Return what verifier and drafter say of themselves now."""
    async with (
        aio_channel(system.verifier_address) as to_verifier,
        aio_channel(system.drafter_address) as to_drafter,
    ):
        verifier = await verifier_pb2_grpc.VerifierServiceStub(to_verifier).GetInfo(
            verifier_pb2.VerifierServiceGetInfoRequest()
        )
        drafter = await drafter_pb2_grpc.DrafterServiceStub(to_drafter).GetInfo(
            drafter_pb2.DrafterServiceGetInfoRequest()
        )
    return verifier, drafter


async def test_state_is_streamed_to_another_shared_directory(tiny_llama: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "verifier", tmp_path / "drafter"
    theirs.mkdir()
    ours.mkdir()
    probe = StateProbe(SPEC)
    async with probed_system(
        tiny_llama,
        probe,
        verifier_options={"shared_dir": str(theirs)},
        drafter_options={"shared_dir": str(ours)},
    ) as system:
        plain = await system.client.generate(PROMPT, PLAIN)
        async with system.client.stream(PROMPT, READING) as stream:
            await anext(stream)
            _, drafter = await info_of(system)
            async for _ in stream:
                pass
    (link,) = drafter.state_links
    assert link.storage == target_state_pb2.STATE_STORAGE_STREAM
    assert "not in this service's shared directory" in link.fallback_reason
    assert stream.result.token_ids == plain.token_ids
    assert stream.result.speculation.num_fallback_rounds == 0
    assert probe.sessions[-1].storages == {BY_STREAM}


def rendered(info: GatewayInfo) -> str:
    """Return what `specdec info` prints, on one line."""
    console = Console(width=400, file=io.StringIO())
    console.print(*info_tables(info))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("of_verifier", "of_drafter"), [("auto", "auto"), ("auto", "stream"), ("stream", "auto")]
)
async def test_what_is_in_use_can_be_seen(
    of_verifier: str, of_drafter: str, tiny_llama: Path, tmp_path: Path
) -> None:
    is_streamed = "stream" in (of_verifier, of_drafter)
    number = (
        target_state_pb2.STATE_STORAGE_STREAM if is_streamed else target_state_pb2.STATE_STORAGE_SHARED_MEMORY
    )
    probe = StateProbe(SPEC)
    here = {"shared_dir": str(tmp_path)}
    verifier_options = {**here, "target_state": of_verifier}
    drafter_options = {**here, "target_state": of_drafter}
    async with probed_system(
        tiny_llama, probe, verifier_options=verifier_options, drafter_options=drafter_options
    ) as system:
        verifier, drafter = await info_of(system)
        assert verifier.state_storage == (
            target_state_pb2.STATE_STORAGE_STREAM
            if of_verifier == "stream"
            else target_state_pb2.STATE_STORAGE_SHARED_MEMORY
        )
        assert verifier.num_state_sessions == verifier.num_state_streams == 0
        assert list(drafter.state_links) == []
        assert TargetStateSpec.from_proto(drafter.drafters[0].target_state_spec) == SPEC
        options = GenerateOptions(max_new_tokens=300, ignore_eos=True, method="probe", draft_depth=1)
        async with system.client.stream(PROMPT, options) as stream:
            for _ in range(4):
                await anext(stream)
            verifier, drafter = await info_of(system)
            info = await system.client.info()
            async for _ in stream:
                pass
        assert verifier.num_state_sessions == 1
        assert verifier.num_state_streams == is_streamed
        (link,) = drafter.state_links
        assert (link.storage, link.num_sessions) == (number, 1)
        assert link.verifier_uri.endswith(system.verifier_address.rpartition(":")[2])
        assert link.fallback_reason == ""
        (service,) = info.drafters
        assert isinstance(service.info, DrafterServiceInfo)
        assert service.info.drafters[0].reads_target_state
        text = rendered(info)
        offer = "stream only" if of_verifier == "stream" else "handle (shared memory)"
        assert f"target state offered by {offer}; 1 sessions export it, {int(is_streamed)} " in text
        how = "stream" if is_streamed else "handle (shared memory)"
        assert f"reads {link.verifier_uri} by {how} (1 sessions)" in text
