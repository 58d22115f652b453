"""The services that a measurement drives: running ones, or local ones that are started for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from specdec.cli.streams import report


def verifier_at(
    address: str | None, model: str, dtype: str, device: str, arguments: Sequence[str] = ()
) -> AbstractContextManager[str]:
    """Yield the address of a verifier, which is started for the block if `address` is None.

    Args:
        arguments: further arguments of the verifier that is started.
    """
    if address:
        return nullcontext(address)
    extra_args = {"verifier": arguments}
    return _local_services(model, dtype, device, ("ngram",), extra_args, service="verifier")


def gateway_at(
    address: str | None,
    model: str,
    dtype: str,
    device: str,
    drafters: Sequence[str],
    *,
    drafter_args: Sequence[str] = (),
    gateway_args: Sequence[str] = (),
) -> AbstractContextManager[str]:
    """Yield the address of a gateway, which is started with its services for the block if `address` is
    None.

    Args:
        drafter_args: further arguments of the drafter service that is started.
        gateway_args: further arguments of the gateway that is started.
    """
    if address:
        return nullcontext(address)
    extra_args = {"drafter": drafter_args, "gateway": gateway_args}
    return _local_services(model, dtype, device, drafters, extra_args)


@contextmanager
def _local_services(
    model: str,
    dtype: str,
    device: str,
    drafters: Sequence[str],
    extra_args: Mapping[str, Sequence[str]],
    service: str = "gateway",
) -> Iterator[str]:
    # Imported here: a run against services elsewhere needs nothing of it.
    from specdec.local.launcher import LocalSystem

    started = time.monotonic()
    with LocalSystem(
        model, dtype=dtype, device=device, drafters=drafters, extra_args=extra_args, report=report
    ) as system:
        report(f"Services ready in {time.monotonic() - started:.1f} s")
        yield system.verifier if service == "verifier" else system.gateway
        peaks = ", ".join(f"{name} {_peak_mib(pid):.0f} MiB" for name, pid in system.pids.items())
        report(f"Peak resident memory: {peaks}")


def _peak_mib(pid: int) -> float:
    """Return the largest resident set of a process so far, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
