"""Prints the kernel table of this machine: python -m parallel.kernels [--device cuda] [--dtype bf16] [--tp 2] [--markdown]."""

from __future__ import annotations

import argparse

import torch

from parallel.kernels.providers import ANY_DTYPE, Workload, short
from parallel.kernels.report import markdown_lines, table_lines
from parallel.kernels.table import resolve_kernels

DTYPES = {short(dtype): dtype for dtype in ANY_DTYPE}


def main() -> None:
    """Print the table, as `--help` says."""
    parser = argparse.ArgumentParser("python -m parallel.kernels", description="Which kernels there are, and which auto takes.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found, help="(default: CUDA if there is any)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations (default: bf16)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default: 1)")
    parser.add_argument("--markdown", action="store_true", help="the providers as a table for the documentation")
    arguments = parser.parse_args()
    if arguments.markdown:
        print("\n".join(markdown_lines()))
        return
    workload = Workload(torch.device(arguments.device), DTYPES[arguments.dtype], arguments.tp)
    can_run = arguments.device == "cpu" or torch.cuda.is_available()
    chosen = resolve_kernels(workload=workload).names if can_run else {}
    print("\n".join(table_lines(workload, chosen)))


if __name__ == "__main__":
    main()
