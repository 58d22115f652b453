"""Where the target's state lives, and whether there is room for all that drafters may read of it."""

from __future__ import annotations

import logging
from pathlib import Path

from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import LoadedModel, usable_device
from specdec.runtime.memory import PrivateMemory, SharedHostMemory, StateMemory
from specdec.runtime.packed_model import PackedModel
from specdec.runtime.state_files import SharedDirectory
from specdec.state.weights import shared_weights_bytes
from verifier_service.config import VerifierConfig

logger = logging.getLogger(__name__)


def make_memory(config: VerifierConfig) -> StateMemory:
    """Make the memory where target state lives, as --target-state says.

    Raises:
        InvalidArgumentError: the device is not there, or the shared directory cannot be used and must be.
    """
    device = usable_device(config.device)
    if config.target_state == "stream":
        return PrivateMemory(device)
    strict = config.target_state == "handle"
    try:
        directory = SharedDirectory(Path(config.shared_dir), config.shared_gid)
    except InvalidArgumentError as error:
        if strict:
            raise
        logger.warning("drafters have to stream target state", extra={"reason": error.message})
        return PrivateMemory(device)
    directory.sweep()
    host = SharedHostMemory(directory, strict=strict)
    if device.type != "cuda":
        return host
    from specdec.runtime.cuda_ipc import CudaIpcMemory

    return CudaIpcMemory(device, host)


def expect_drafters(packed: PackedModel, loaded: LoadedModel) -> None:
    """Warn if shared memory has no room for what drafters will read besides KV."""
    weights = shared_weights_bytes(loaded.model)
    layer = packed.pool.most_tokens * packed.capture.hidden_size * loaded.model.dtype.itemsize
    use = (
        f"{weights / 2**20:.0f} MiB more for the embedding and the LM head, and {layer / 2**20:.0f} MiB for "
        "each layer of hidden states"
    )
    packed.pool.memory.expect(weights + layer, use)
