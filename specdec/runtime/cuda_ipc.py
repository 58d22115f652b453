"""Target state in the memory of a GPU, mapped by another process on the same GPU.

The pool is one cudaMalloc of its own: memory of torch's caching allocator can be exported only together with
its neighbours, and not at all with expandable segments. An interprocess event orders a reader's work after
the writer's. The two processes must share a PID namespace and see the same device.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import torch

from specdec.contract.errors import FailedPreconditionError, ResourceExhaustedError
from specdec.contract.target_state import CudaIpc, StateStorage
from specdec.runtime.memory import Region, SharedHostMemory, StateMemory

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_SHARED_UNIT_BYTES = 2 * 2**20


class _IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t, passed by value."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


@cache
def _runtime() -> Any:
    """Return the CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(f"libcudart.so.{major}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _IpcHandle, ctypes.c_uint)
    library.cudaMalloc.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
    for name in ("cudaFree", "cudaIpcCloseMemHandle"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    return library


def _check(code: int, what: str) -> None:
    if code:
        _runtime().cudaGetLastError()  # or the next torch operation would report it as its own
        reason = _runtime().cudaGetErrorString(code).decode()
        raise FailedPreconditionError(f"{what}: {reason}.", reason="STATE_NOT_MAPPED")


class _DeviceBytes:
    """Device memory in the form torch.as_tensor takes without copying; its tensors keep it alive."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _allocation_size(pointer: int) -> int:
    """Return the size of the allocation that begins at a device pointer, bytes."""
    base, size = ctypes.c_void_p(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_void_p(pointer))
    return 0 if code or base.value != pointer else size.value


def _unmap(pointer: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        _runtime().cudaIpcCloseMemHandle(pointer)


def device_uuid(device: torch.device) -> str:
    """Return the identity of a GPU, the same in every process and container."""
    return str(torch.cuda.get_device_properties(device).uuid)


class CudaIpcMemory(StateMemory):
    """Allocations of a GPU that drafters on the same GPU can map.

    Args:
        device: the target's.
        host: for what readers check on the host.
    """

    kind = StateStorage.CUDA_IPC

    def __init__(self, device: torch.device, host: SharedHostMemory) -> None:
        self._device = device
        self._host = host
        with torch.cuda.device(device):
            self._event = torch.cuda.Event(interprocess=True)
            self._event.record()  # an event that was never recorded has no handle
            self._event_handle = bytes(self._event.ipc_handle())

    def allocate(self, num_bytes: int) -> Region:
        """Make one zeroed cudaMalloc, in whole units of what the driver shares, lest it share neighbours."""
        num_bytes = -(-num_bytes // _SHARED_UNIT_BYTES) * _SHARED_UNIT_BYTES
        pointer, handle = ctypes.c_void_p(), _IpcHandle()
        with torch.cuda.device(self._device):
            code = _runtime().cudaMalloc(ctypes.byref(pointer), num_bytes)
            if code:
                _runtime().cudaGetLastError()
                raise ResourceExhaustedError(
                    f"The GPU has no room for {num_bytes / 2**20:.0f} MiB; lower --kv-cache-mib.",
                    reason="DEVICE_MEMORY_FULL",
                )
            assert pointer.value is not None
            _check(_runtime().cudaIpcGetMemHandle(ctypes.byref(handle), pointer), "cudaIpcGetMemHandle")
            tensor = torch.as_tensor(_DeviceBytes(pointer.value, num_bytes), device=self._device).zero_()
        storage = CudaIpc(device_uuid(self._device), bytes(handle), 0, self._event_handle, num_bytes)
        return Region(tensor, storage)

    def allocate_host(self, num_bytes: int) -> Region:
        """Make a shared file of the host."""
        return self._host.allocate(num_bytes)

    def record(self) -> None:
        """Record the event readers wait for, on the current stream."""
        with torch.cuda.device(self._device):
            self._event.record()

    def close(self) -> None:
        """Take the host's files away. Device memory ends with the process: freeing what a reader maps is
        undefined."""
        self._host.close()


class CudaMapping:
    """Device memory of another process.

    Raises:
        FailedPreconditionError: it is another GPU's, or the driver refuses.
    """

    def __init__(self, storage: CudaIpc, device: torch.device) -> None:
        if device.type != "cuda" or device_uuid(device) != storage.device_uuid:
            raise FailedPreconditionError("The state is on another GPU.", reason="STATE_NOT_MAPPED")
        if len(storage.memory_handle) != _HANDLE_BYTES:
            raise FailedPreconditionError("The memory handle is malformed.", reason="STATE_NOT_MAPPED")
        self._device = device
        pointer = ctypes.c_void_p()
        handle = _IpcHandle.from_buffer_copy(storage.memory_handle)
        with torch.cuda.device(device):
            code = _runtime().cudaIpcOpenMemHandle(ctypes.byref(pointer), handle, _LAZY_PEER_ACCESS)
            _check(code, "The state on the GPU cannot be mapped")
            assert pointer.value is not None
            owner = _DeviceBytes(pointer.value, storage.size)
            # With the last tensor, not with this object: a pass may still read.
            weakref.finalize(owner, _unmap, pointer.value, device).atexit = False
            if storage.size > _allocation_size(pointer.value):
                raise FailedPreconditionError(
                    "The state is said to be larger than its memory.", reason="STATE_NOT_MAPPED"
                )
            self._event = torch.cuda.Event.from_ipc_handle(device, storage.event_handle)
            self.bytes = torch.as_tensor(owner, device=device)
            """uint8 [size]; to be read only."""

    def wait(self) -> None:
        """Let the default stream, on which drafters run, wait for what the verifier wrote before it last
        recorded its event."""
        self._event.wait(torch.cuda.default_stream(self._device))
