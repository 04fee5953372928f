"""Which code this is, for checkpoints and logs."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import megatron_llama


@cache
def code_version() -> str:
    """The package's version, and in a git checkout its commit: `0.1.0+g1a2b3c4d5e`, or `...-dirty` where files were changed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return megatron_llama.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return megatron_llama.__version__
    return f"{megatron_llama.__version__}+g{found.stdout.strip()}"
