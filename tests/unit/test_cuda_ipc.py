"""Target state in a GPU's memory, written by one process and read by another."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.client import AsyncClient, GenerateOptions
from specdec.client.gateway_info import DrafterServiceInfo
from specdec.contract.errors import FailedPreconditionError
from specdec.contract.target_state import CudaIpc, SharedMemory, StateStorage
from specdec.local.processes import free_ports
from specdec.runtime.memory import SharedHostMemory
from specdec.runtime.state_files import SharedDirectory
from tests.probe_service import ENV, probe_command, service_group
from tests.systems import running_gateway, running_verifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NUM_ELEMENTS = 1 << 20
NUM_BYTES = 4 * NUM_ELEMENTS
LONG_CYCLES = 2_000_000_000
"""About a second of a GPU's time."""
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]

READER = """
import json, sys, torch
from specdec.runtime.cuda_ipc import CudaMapping
from specdec.contract.target_state import CudaIpc
fields = json.loads(sys.stdin.readline())
for name in ("memory_handle", "event_handle"):
    fields[name] = bytes.fromhex(fields[name])
mapping = CudaMapping(CudaIpc(**fields), torch.device("cuda:0"))
values = mapping.bytes.view(torch.float32)
print(json.dumps([len(mapping.bytes)]), flush=True)
for line in sys.stdin:
    mapping.wait()
    print(json.dumps([values.min().item(), values.max().item()]), flush=True)
del values
del mapping
"""


class Reader:
    """Another process on the same GPU."""

    def __init__(self, storage: CudaIpc) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENV},
            text=True,
        )
        fields = {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in asdict(storage).items()
        }
        self.num_bytes = self.ask(json.dumps(fields))[0]

    def ask(self, line: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    from specdec.runtime.cuda_ipc import CudaIpcMemory

    host = SharedHostMemory(SharedDirectory(tmp_path), strict=True)
    memory = CudaIpcMemory(torch.device("cuda:0"), host)
    yield memory
    memory.close()


def test_what_one_process_writes_another_reads(memory: Any) -> None:
    region = memory.allocate(NUM_BYTES)
    assert memory.kind is StateStorage.CUDA_IPC
    assert isinstance(region.storage, CudaIpc)
    assert region.locate(64).offset == 64
    assert isinstance(memory.allocate_host(64).storage, SharedMemory)
    values = region.tensor.view(torch.float32)
    assert not values.any()
    reader = Reader(region.storage)
    try:
        assert reader.num_bytes == NUM_BYTES
        for value in (1.5, 2.5):
            values.fill_(value)
            memory.record()
            assert reader.ask("read") == [value, value]
    finally:
        reader.close()


def test_a_reader_waits_for_what_was_written_before_the_event(memory: Any) -> None:
    region = memory.allocate(NUM_BYTES)
    values = region.tensor.view(torch.float32)
    reader = Reader(region.storage)
    try:
        torch.cuda.synchronize()
        for value in (3.0, 4.0):
            torch.cuda._sleep(LONG_CYCLES)
            values.fill_(value)
            memory.record()
            written = torch.cuda.Event()
            written.record()
            assert not written.query()  # the reader is asked long before it is there
            assert reader.ask("read") == [value, value]
            assert written.query()
    finally:
        reader.close()


def test_handles_of_another_gpu_or_of_nothing_are_refused(memory: Any) -> None:
    from dataclasses import replace

    from specdec.runtime.cuda_ipc import CudaMapping

    storage = memory.allocate(NUM_BYTES).storage
    device = torch.device("cuda:0")
    wrong = (
        replace(storage, device_uuid="another"),
        replace(storage, memory_handle=b"short"),
        replace(storage, memory_handle=bytes(64)),
    )
    for forged in wrong:
        with pytest.raises(FailedPreconditionError) as raised:
            CudaMapping(forged, device)
        assert raised.value.reason == "STATE_NOT_MAPPED"
    with pytest.raises(FailedPreconditionError):
        CudaMapping(storage, torch.device("cpu"))
    # An error of the driver is not left for the next operation to report.
    assert torch.ones(4, device=device).sum().item() == 4


@pytest.mark.parametrize(("mode", "storage"), [("handle", "cuda_ipc"), ("stream", "stream")])
async def test_a_generation_whose_drafter_reads_the_gpu(
    mode: str, storage: str, tiny_llama: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    options = ("--device", "cuda:0", "--target-state", mode, "--shared-dir", str(tmp_path))
    group = service_group(tmp_path / "logs", {"drafter": (address, probe_command(address, 5, *options))})
    await asyncio.to_thread(group.start)
    try:
        async with (
            running_verifier(tiny_llama, device="cuda:0", shared_dir=str(tmp_path)) as (verifier_at, _),
            running_gateway(tiny_llama, verifier=verifier_at, drafter=address) as (gateway_at, _),
            AsyncClient(gateway_at, timeout_s=60) as client,
        ):
            plain = await client.generate(PROMPT, GenerateOptions(method="none", max_new_tokens=60))
            async with client.stream(PROMPT, GenerateOptions(method="probe", max_new_tokens=60)) as stream:
                for _ in range(4):
                    await anext(stream)
                info = await client.info()
                async for _ in stream:
                    pass
    finally:
        await asyncio.to_thread(group.stop, 5)
    assert stream.result.token_ids == plain.token_ids
    assert stream.result.speculation.num_fallback_rounds == 0
    assert stream.result.speculation.num_draft_tokens > 0
    (service,) = info.drafters
    assert isinstance(service.info, DrafterServiceInfo)
    assert [link.storage for link in service.info.state_links] == [storage]
