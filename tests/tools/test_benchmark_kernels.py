"""The benchmark of the kernels at tiny sizes: it compares what can run here, and prints what it was run on."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (
    *("tools/benchmark_kernels.py", "--preset", "llama-tiny", "--vocab-size", "300", "--sequence-length", "8"),
    *("--rounds", "1", "--device", "cpu", "--dtype", "fp32", "--without-compile"),
)
OPERATIONS = ("rms_norm", "add_rms_norm", "rope", "qkv_rope", "swiglu", "attention", "wgrad", "cross_entropy", "head_loss")


def test_providers_and_heads_are_timed_and_agree():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *COMMAND], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "fails" not in done.stdout, done.stdout
    for line in (r"^command    python tools/benchmark_kernels", r"^hardware   .*CPU", r"^versions   Python \d.*torch \d"):
        assert re.search(line, done.stdout, re.MULTILINE)
    rows = re.findall(r"^  (\w+) +(\w+) +[\d.]+ ms +[\d.]+ x +(\S+)$", done.stdout, re.MULTILINE)
    assert {operation for operation, provider, _ in rows if provider == "reference"} == set(OPERATIONS)
    assert ("head_loss", "torch") in {row[:2] for row in rows}
    heads = re.findall(r"^  (.+?) +[\d.]+ ms +\d+ MiB +(\S+)$", done.stdout, re.MULTILINE)
    assert {"chunks of 256 MiB", "whole logits", "plain torch"} <= {name for name, _ in heads}
    assert all(float(error) < 1e-5 for error in [row[-1] for row in rows + heads])
