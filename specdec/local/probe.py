"""Which services are healthy, asked by a process of its own: python -m specdec.local.probe ADDRESS NAME ...

Where no more threads can be made, gRPC aborts its process or waits for ever in it. A supervisor has to end in
any case, so it leaves gRPC to this program, which it can kill.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from specdec.local.tied import tied

POLL_S = 0.1
"""Seconds between two checks of a starting service."""

Spawn = Callable[[], "subprocess.Popen[bytes]"]


def is_serving(address: str, service: str) -> bool:
    """Return whether the health check of a service says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    # A short backoff: by default gRPC would only try the service again after seconds.
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class Probe:
    """Learns which services have become healthy. No call of it waits.

    Args:
        services: names of the services in their health checks, by address.
        env: the environment of the process that asks.
        run_in_owner: runs a function in the thread that the process must not outlive.
    """

    def __init__(
        self,
        services: Mapping[str, str],
        env: Mapping[str, str],
        run_in_owner: Callable[[Spawn], subprocess.Popen[bytes]],
    ) -> None:
        self._services = dict(services)
        self._env = env
        self._run_in_owner = run_in_owner
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""

    def waiting_for(self) -> set[str]:
        """Return the addresses of the services that have not been healthy yet."""
        self._read()
        for line in self._output.split(b"\n")[:-1]:
            self._services.pop(line.decode(), None)
        if self._services and (self._process is None or self._process.poll() is not None):
            self.close()
            with suppress(OSError):  # no room for a process now; there may be some at the next call
                self._process = self._run_in_owner(self._spawn)
        return set(self._services)

    def _read(self) -> None:
        if self._process and self._process.stdout:
            self._output += self._process.stdout.read() or b""

    def _spawn(self) -> subprocess.Popen[bytes]:
        pairs = [word for pair in self._services.items() for word in pair]
        process = subprocess.Popen(
            tied((sys.executable, "-m", __name__, *pairs)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=self._env,
            start_new_session=True,  # Ctrl-C is for the launcher
        )
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        self._output = b""
        return process

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Print the address of each service once it is healthy; end when all are."""
    waiting = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    while waiting:
        for address in [address for address, service in waiting.items() if is_serving(address, service)]:
            print(address, flush=True)
            del waiting[address]
        time.sleep(POLL_S if waiting else 0)


if __name__ == "__main__":
    main()
