"""Sets up the reader of target state as the drafter service is configured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from drafter_service.config import DrafterConfig
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import resolve_model
from specdec.runtime.loading import usable_device
from specdec.runtime.state_files import SharedDirectory, StateFiles
from specdec.state.reader import Link, ReaderConfig, StateReader
from specdec.state.weights import read_weights
from specdec.transport.tls import OutgoingTls

logger = logging.getLogger(__name__)


def load_reader(
    config: DrafterConfig, tls: OutgoingTls | None, on_link: Callable[[Link], None]
) -> StateReader:
    """Return a reader, with the target's weights if a checkpoint is named.

    Where the verifier's own may be mapped, the checkpoint's are read when that fails.

    Args:
        tls: credentials for verifiers; None: connections are not encrypted.
        on_link: called for every session that begins to read.

    Raises:
        InvalidArgumentError: handles are demanded and the shared directory cannot be used.
        NotFoundError: there is no such checkpoint.
    """
    device = usable_device(config.device)
    directory = None if config.target_state == "stream" else _shared_files(config)
    checkpoint = None
    if config.target:
        folder, dtype = resolve_model(config.target), getattr(torch, config.dtype)
        checkpoint = cache(partial(read_weights, folder, dtype, device))
        if directory is None:
            checkpoint()  # now, and not while a first draft waits
    reader_config = ReaderConfig(
        mode=config.target_state,
        device=device,
        directory=directory,
        mirror_bytes=int(config.mirror_mib * 2**20),
        stream_projected=config.stream_features == "projected",
        verifier_allow=config.verifier_allow,
    )
    return StateReader(reader_config, checkpoint, on_link, tls=tls)


def _shared_files(config: DrafterConfig) -> StateFiles | None:
    if config.shared_gid is not None:
        # Files of another user: a directory of this one's own is not needed, and may be impossible to make.
        return StateFiles(Path(config.shared_dir), config.shared_gid)
    try:
        directory = SharedDirectory(Path(config.shared_dir))
        directory.sweep()
        return directory
    except InvalidArgumentError as error:
        if config.target_state == "handle":
            raise
        logger.warning("target state has to be streamed", extra={"reason": error.message})
        return None
