"""What is installed, what works, and what to mend: on this machine, or on all nodes of a job.

    python tools/doctor.py
    torchrun --nproc-per-node 8 tools/doctor.py --directory runs/7b
    srun --ntasks-per-node=8 python tools/doctor.py --directory /scratch/runs/7b       (mpirun likewise)

Prints PASS, WARN or FAIL for each check, with what to do about it, and ends with 1 where something failed. As a job it also
compares the nodes (versions, names, clocks), checks and times an all-reduce and the link from each rank to the next, and finds
out whether all nodes see the same directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

try:
    import torch

    from megatron_llama.doctor.finding import Finding, summary
    from megatron_llama.doctor.installation import installation_findings
    from megatron_llama.doctor.ranks import rank_findings, world_axis
    from megatron_llama.doctor.storage import storage_findings
    from megatron_llama.program import run_program
    from megatron_llama.tool_frame import positive_integer
    from parallel import launch as launching
    from parallel.collectives import contact_kept
    from parallel.launch import Launch
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--directory", type=Path, default=Path("runs"), help="where checkpoints would go (default runs)")
    add("--mib", type=positive_integer, default=0, metavar="N", help="sent and written in the timings (default: 16, GPUs 256)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the ranks")
    add("--timeout", type=positive_integer, default=120, metavar="SECONDS", help="that ranks wait for each other (default 120)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main(launch: Launch) -> int:
    """Examine; returns 1 where a check failed, on every rank."""
    arguments = parse_arguments()
    device = launching.choose_device(launch, arguments.device)
    findings: list[Finding] = []
    for finding in examine(launch, device, arguments):
        findings.append(finding)
        if not arguments.json:
            print("\n".join(finding.lines()), flush=True)
    if launch.rank == 0:
        values = [asdict(finding) for finding in findings]
        print(json.dumps(values, indent=2) if arguments.json else f"\n{summary(findings)}")
    return int(any(finding.state == "FAIL" for finding in findings))


def examine(launch: Launch, device: torch.device, arguments: argparse.Namespace) -> Iterator[Finding]:
    """All checks, on rank 0; the other ranks take part and yield nothing."""
    mib = arguments.mib or (256 if device.type == "cuda" else 16)
    if launch.rank == 0:
        yield from installation_findings(device, launch.local_world_size)
    launching.start(launch, device, timedelta(seconds=arguments.timeout))
    world = world_axis(launch.rank, launch.world_size)
    with contact_kept(world):
        if launch.world_size > 1:
            yield from rank_findings(world, device, mib)
        yield from storage_findings(arguments.directory, world, device, mib)


if __name__ == "__main__":
    sys.exit(run_program(main))
