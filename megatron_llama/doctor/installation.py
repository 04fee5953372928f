"""What is installed on this node and usable. Nothing is imported that is not needed to know it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llama.doctor.finding import Finding, failed, passed, warned
from parallel.kernels.providers import ApexPackage, is_installed
from parallel.kernels.table import ROWS
from parallel.launch import environment_of_no_rank

PYTHONS, TORCHES = ((3, 11), (3, 12)), ((2, 11), (2, 13))  # the oldest and the newest that are supported
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 1 << 30  # that NCCL, shared loading and heartbeats of a node of 8 GPUs get along with
OPEN_FILES = 4096  # the sockets of a large job
PROBE_SECONDS = 60.0


def installation_findings(device: torch.device, local_ranks: int) -> Iterator[Finding]:
    """The checks of one node, on which `local_ranks` processes use devices like `device`."""
    yield _python()
    yield _torch()
    yield from _cuda()
    yield from _kernels(device)
    yield from _deepspeed()
    yield from _mpi()
    yield _slurm()
    yield from _limits(local_ranks)


def _python() -> Finding:
    version = sys.version.split()[0]
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return passed("python", f"{version} at {sys.executable}")
    known = " and ".join(".".join(map(str, one)) for one in PYTHONS)
    return warned("python", f"{version}: tested are {known}", "make PYTHON=python3.12 quickstart")


def _torch() -> Finding:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if TORCHES[0] <= version <= TORCHES[1]:
        return passed("torch", torch.__version__)
    oldest, newest = (".".join(map(str, one)) for one in TORCHES)
    return failed("torch", f"{torch.__version__}: {oldest} to {newest} are supported", f"pip install 'torch=={newest}.*'")


def _cuda() -> Iterator[Finding]:
    """GPUs, and what stands between them and torch."""
    count = torch.cuda.device_count()
    if not count:
        driver = shutil.which("nvidia-smi")
        if driver and _output(driver, "-L"):
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
            yield failed("cuda", f"nvidia-smi lists GPUs, and torch ({built}) sees none", "install torch for the driver's CUDA")
        else:
            yield warned("cuda", "no GPU: everything runs on CPUs, over gloo", "none, where that is meant")
        return
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    yield passed("cuda", f"{count} x {', '.join(sorted(names))}, capability {capability}, CUDA {torch.version.cuda}")
    if len(names) > 1:
        yield warned("cuda", "the GPUs of this node differ: the slowest sets the pace", "choose with CUDA_VISIBLE_DEVICES")
    if torch.cuda.get_device_capability(0) < (8, 0):
        yield warned("cuda", "bf16 is emulated before the Ampere generation", "--train.dtype fp16")
    if dist.is_nccl_available():
        yield passed("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield failed("nccl", "this torch has no NCCL: GPUs cannot work together", "install torch from its own index")


def _kernels(device: torch.device) -> Iterator[Finding]:
    """The packages behind the kernel table, each once."""
    seen: dict[str, list[str]] = {}
    packages = {}
    for operation, row in ROWS.items():
        for provider in row:
            if provider.package is not None:
                seen.setdefault(provider.name, []).append(operation)
                packages.setdefault(provider.name, []).append(provider.package)
    for name, operations in seen.items():
        missing = next(filter(None, (package.missing() for package in packages[name])), None)
        used = f"for {', '.join(dict.fromkeys(operations))}"
        if missing is None:
            yield passed(name, f"installed, {used}")
            continue
        what, _, how = missing.rpartition(": ")
        if isinstance(packages[name][0], ApexPackage) and is_installed("apex") and "not NVIDIA's" in missing:
            fix = "pip uninstall apex, then build NVIDIA's from its source"
            yield failed(name, "the installed 'apex' is not NVIDIA's and hides it", fix)
        elif device.type == "cuda":
            yield warned(name, f"{what} ({used})", how)
        else:
            yield passed(name, f"not installed ({used}); only GPUs use it")


def _deepspeed() -> Iterator[Finding]:
    """The package, and whether its extensions can be built here; that is asked in a process of its own."""
    if not is_installed("deepspeed"):
        fix = "pip install 'megatron-llama[deepspeed]'"
        yield warned("deepspeed", "not installed: zero.engine = deepspeed cannot be had", fix)
        return
    version = importlib.metadata.version("deepspeed")
    script = (
        "from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder\n"
        "for b in (AsyncIOBuilder(), CPUAdamBuilder(), FusedAdamBuilder()): print('OP', b.NAME, b.is_compatible(verbose=False))"
    )
    found = dict(re.findall(r"^OP (\w+) (\w+)", _output(sys.executable, "-c", script), re.MULTILINE))
    if not found:
        yield failed("deepspeed", f"{version} cannot be imported", f'{sys.executable} -c "import deepspeed" says why')
        return
    usable = [name for name, compatible in found.items() if compatible == "True"]
    yield passed("deepspeed", f"{version}; can be built here: {', '.join(usable) or 'no extension'}")
    if "async_io" not in usable:
        yield warned("deepspeed", "async_io cannot be built: no zero.offload = nvme", "apt-get install libaio-dev")


def _mpi() -> Iterator[Finding]:
    """mpirun and mpi4py, and that the latter can be imported. It is tried in a process of its own, as one rank."""
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None and not is_installed("mpi4py"):
        yield passed("mpi", "neither mpirun nor mpi4py: torchrun, srun and the supervisor need none")
        return
    if mpirun is not None:
        yield passed("mpi", f"{(_output(mpirun, '--version').splitlines() or ['?'])[0]} at {mpirun}")
    if not is_installed("mpi4py"):
        yield warned("mpi", "no mpi4py: mpirun needs -x MASTER_ADDR on several nodes", "pip install mpi4py")
        return
    version = _output(sys.executable, "-c", "from mpi4py import MPI; print('LIB', MPI.Get_library_version().splitlines()[0])")
    library = re.search(r"^LIB (.*)", version, re.MULTILINE)
    if library:
        yield passed("mpi", f"mpi4py {importlib.metadata.version('mpi4py')} with {library[1].rstrip(chr(0))[:60]}")
    else:
        fix = "build it for this MPI: pip install --no-binary=mpi4py mpi4py"
        yield failed("mpi", "mpi4py finds no MPI library that works", fix)


def _slurm() -> Finding:
    if shutil.which("srun") is None:
        return passed("slurm", "not on this node: torchrun, mpirun and the supervisor need none")
    version = _output("srun", "--version").strip()
    if not version:
        return warned("slurm", "srun does not answer", "srun --version says why; its configuration may be missing here")
    return passed("slurm", version)


def _limits(local_ranks: int) -> Iterator[Finding]:
    """What the system allows a process."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    if local_ranks > 1 and local_ranks * threads > cores:
        text = f"{local_ranks} ranks x {threads} threads on {cores} cores"
        fix = f"export OMP_NUM_THREADS={cores // local_ranks}" if local_ranks <= cores else f"at most {cores} ranks per node"
        yield warned("cores", text, fix)
    else:
        yield passed("cores", f"{cores}, {threads} threads for each of {local_ranks} ranks here")
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        if size < SHARED_MEMORY_BYTES:
            text = f"{SHARED_MEMORY} has {size / 2**20:,.0f} MiB: ranks that share memory die by SIGBUS when it is full"
            yield warned("shared memory", text, "docker run --ipc=host, or --shm-size=16g")
        else:
            yield passed("shared memory", f"{SHARED_MEMORY} has {size / 2**30:,.1f} GiB")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < OPEN_FILES:
        yield warned("open files", f"at most {files}, and a rank has a socket for each peer", f"ulimit -n {OPEN_FILES}")
    else:
        yield passed("open files", f"at most {files:,}")


def _output(*command: str) -> str:
    """What a program prints; empty where it fails or does not answer. It is started as no rank of anything."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment_of_no_rank())
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
