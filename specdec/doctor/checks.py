"""What facts about a machine mean for services on it: each check says in a sentence what it found, and what
to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from specdec.doctor.facts import Facts, Library

_MIB, _GIB = 2**20, 2**30
_BUSY_CORES = 0.4
"""How many busy cores are too many: passes of all threads wait for the slowest."""
_SHARED_BYTES = 300 * _MIB
"""What a verifier of the default model shares: 256 MiB of KV, and hidden states."""
_MEMORY_BYTES = 2 * _GIB
"""What the services of the default model take, with all its drafters: 1.4 GiB, and the KV."""
_OPEN_FILES = 1024
_FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_INSTALL = "pip install --upgrade 'specdec[models]'"


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but slower or with less than there could be."""
    PROBLEM = "problem"
    """Something does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    name: str
    """What was looked at."""
    level: Level
    says: str
    """What there is, in a sentence."""
    do: str = ""
    """What to do about it; empty: nothing."""


Check = Callable[[Facts], Finding]


def busy_cores(facts: Facts) -> Finding:
    """Look for neighbours: with one that is busy, a pass takes several times as long."""
    used = f"Programs keep {facts.busy_cores:.1f} of {facts.num_cores} cores busy"
    if facts.busy_cores < _BUSY_CORES:
        return Finding("busy cores", Level.OK, f"{used}.")
    return Finding(
        "busy cores",
        Level.WARNING,
        f"{used}; one busy neighbour makes a pass of the target several times slower.",
        "Stop what else runs, or give the services cores of their own (taskset, a cpuset), or start them "
        "with `specdec up --threads 1`.",
    )


def number_of_cores(facts: Facts) -> Finding:
    """Compare the cores with what a container leaves of their time."""
    if facts.quota is not None and facts.quota < facts.num_cores:
        return Finding(
            "cores",
            Level.WARNING,
            f"There are {facts.num_cores} cores, but the container may use the time of {facts.quota}; "
            "whoever uses it up stands still for the rest of each tenth of a second.",
            f"Give the container {facts.quota} whole cores (--cpuset-cpus) in place of a quota (--cpus).",
        )
    if facts.num_cores < 2:
        return Finding(
            "cores",
            Level.WARNING,
            "There is one core, which the target and the drafters share.",
            "Use at least two cores, or drafters that only look up: `specdec up --drafter ngram-lm`.",
        )
    return Finding("cores", Level.OK, f"There are {facts.num_cores} cores.")


def processor(facts: Facts) -> Finding:
    """Look for what makes bf16 fast."""
    found = sorted(_FAST_BF16 & facts.cpu_flags)
    if found:
        return Finding("processor", Level.OK, f"The processor computes bf16 itself ({', '.join(found)}).")
    lacks = "AVX512" if "avx512f" not in facts.cpu_flags else "AVX512-BF16"
    return Finding(
        "processor",
        Level.WARNING,
        f"The processor ({facts.cpu}) has neither {lacks} nor AMX: it computes bf16 slowly, and drafts by "
        "models may cost more than they bring.",
        "Use a machine with AVX512-BF16 or AMX (Xeon since 2023, EPYC since Zen 4) or a GPU; measure with "
        "`specdec bench run --methods ngram-lm,mtp`.",
    )


def torch_there(facts: Facts) -> Finding:
    """Look whether models can run at all."""
    if facts.torch:
        return Finding("torch", Level.OK, f"torch {facts.torch.version} loads.")
    if facts.torch_error:
        says = f"torch cannot be loaded: {facts.torch_error}."
        return Finding("torch", Level.PROBLEM, says, f"Install it anew: {_INSTALL}")
    return Finding(
        "torch",
        Level.WARNING,
        "torch is not installed: the gateway, the client and the commands run here, but no models.",
        f"Where models are to run: {_INSTALL}",
    )


def kernels(facts: Facts) -> Finding:
    """Look whether the kernels in C were built."""
    if facts.torch is None:
        return Finding("kernels", Level.OK, "The kernels in C are of use only with torch.")
    if facts.torch.has_kernels:
        return Finding("kernels", Level.OK, "The kernels in C are there.")
    return Finding(
        "kernels",
        Level.WARNING,
        "The kernels in C were not built or are of another version, so passes on a CPU take longer.",
        "Install a C compiler (Debian: gcc and libc6-dev), then this package once more: "
        "pip install --force-reinstall --no-deps specdec",
    )


def shared_memory(facts: Facts) -> Finding:
    """Look whether the target's state finds room where drafters can map it."""
    hint = (
        "Give the container more (--shm-size 1g, or a volume in memory), or both services another directory "
        "in memory with --shared-dir."
    )
    if facts.shared_free_bytes is None:
        says = f"{facts.shared_dir} cannot be written to, so drafters get the target's state as a stream."
        return Finding("shared memory", Level.WARNING, says, hint)
    free = f"{facts.shared_dir} has {facts.shared_free_bytes // _MIB} MiB free"
    if facts.shared_free_bytes >= _SHARED_BYTES or facts.system:
        return Finding("shared memory", Level.OK, f"{free}.")
    return Finding(
        "shared memory",
        Level.WARNING,
        f"{free}, and a verifier shares {_SHARED_BYTES // _MIB} MiB: what finds no room is streamed to "
        "drafters, which takes longer.",
        hint,
    )


def memory(facts: Facts) -> Finding:
    """Look whether the default model has room."""
    free = f"{facts.available_bytes / _GIB:.1f} GiB of memory are free"
    if facts.system:
        return Finding("memory", Level.OK, f"{free} beside the services that run.")
    if facts.available_bytes >= _MEMORY_BYTES:
        return Finding("memory", Level.OK, f"{free}.")
    return Finding(
        "memory",
        Level.PROBLEM,
        f"{free}; the default model with its drafters takes {_MEMORY_BYTES // _GIB} GiB.",
        "Free some memory, or start with less: `specdec up --drafter ngram --kv-cache-mib 64`.",
    )


def gpu(facts: Facts) -> Finding:
    """Look whether torch can use the GPU that is there."""
    if not facts.gpu:
        return Finding("GPU", Level.OK, "There is no NVIDIA GPU; models run on the CPU.")
    if facts.torch is None:
        return Finding("GPU", Level.OK, f"There is a GPU ({facts.gpu}), and no torch to use it.")
    if facts.torch.is_gpu_usable:
        says = f"torch {facts.torch.version} can use the GPU ({facts.gpu}); choose it with --device cuda:0."
        return Finding("GPU", Level.OK, says)
    built_for = f"CUDA {facts.torch.cuda}" if facts.torch.cuda else "CPUs"
    return Finding(
        "GPU",
        Level.WARNING,
        f"There is a GPU ({facts.gpu}), but torch {facts.torch.version}, built for {built_for}, cannot use "
        f"it: {facts.torch.gpu_error}.",
        f"Install a driver for {built_for}, or a torch for the driver that is there."
        if facts.torch.cuda
        else "Install the same version of torch built for CUDA, as its installation page says.",
    )


def libraries(facts: Facts) -> Finding:
    """Compare the libraries with what this package takes, and with what it was tested with."""
    wrong = [each for each in facts.libraries if not each.is_wanted]
    if wrong:
        listed = ", ".join(f"{each.name} {each.installed or 'is missing'} ({each.wanted})" for each in wrong)
        says = f"Libraries are not of the versions that this package takes: {listed}."
        return Finding("libraries", Level.PROBLEM, says, f"Install them anew: {_INSTALL}")
    untested = [each for each in facts.libraries if _is_untested(each)]
    if untested:
        listed = ", ".join(f"{each.name} {each.installed} ({each.pinned})" for each in untested)
        says = f"Libraries have other versions than the tests run with: {listed}."
        do = (
            "If something goes wrong, install the tested ones: pip install -c .ci/constraints.txt '.[models]'"
        )
        return Finding("libraries", Level.WARNING, says, do)
    return Finding("libraries", Level.OK, f"All {len(facts.libraries)} libraries have versions that fit.")


def _is_untested(library: Library) -> bool:
    # A build for another device, such as 2.13.0+cpu, is of the same version.
    return bool(library.pinned) and library.installed.partition("+")[0] != library.pinned.partition("+")[0]


def open_files(facts: Facts) -> Finding:
    """Look whether services may open enough files: each connection is one."""
    says = f"A process may have {facts.open_files} files open at a time"
    if facts.open_files >= _OPEN_FILES:
        return Finding("open files", Level.OK, f"{says}.")
    return Finding(
        "open files",
        Level.WARNING,
        f"{says}, and each connection takes one: a service refuses clients beyond that.",
        f"Run `ulimit -n {_OPEN_FILES}` in the shell that starts the services."
        if facts.most_open_files >= _OPEN_FILES
        else "Have the limit raised: nofile in /etc/security/limits.conf, or --ulimit nofile of a container.",
    )


def services(facts: Facts) -> Finding:
    """Look how the services of `specdec up` do."""
    if facts.system_error:
        do = "See that you may read that directory, or set SPECDEC_STATE_DIR to another."
        return Finding("services", Level.PROBLEM, facts.system_error, do)
    if facts.system is None:
        return Finding("services", Level.OK, "No system of `specdec up` runs here.")
    silent = [name for name, is_healthy in facts.system.items() if not is_healthy]
    if not silent:
        return Finding("services", Level.OK, f"{', '.join(facts.system)} run and are healthy.")
    return Finding(
        "services",
        Level.PROBLEM,
        f"Of the services of `specdec up`, {' and '.join(silent)} do not answer that they are healthy.",
        f"Look at the end of {facts.logs}/{silent[0]}.log; `specdec down` and `specdec up` start them anew.",
    )


CHECKS: tuple[Check, ...] = (
    busy_cores,
    number_of_cores,
    processor,
    torch_there,
    kernels,
    gpu,
    memory,
    shared_memory,
    libraries,
    open_files,
    services,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Return what all checks found."""
    return [check(facts) for check in CHECKS]
