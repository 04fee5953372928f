"""The examples fit the program: configurations validate, the job script passes its arguments on, the quickstart runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llama.config import load_config, micro_batches_per_step, validate
from megatron_llama.flops import parameter_count

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DATA = ["--data.train", "train", "--data.valid", "valid"]

# file -> what its comment says, the processes that this means, the micro-batches that it promises
CONFIGS = {
    "laptop.toml": [("python -m megatron_llama.train", 1, None), ("--nproc-per-node=4", 4, None)],
    "llama-7b.toml": [("4 nodes of 8", 32, 64), ("any multiple of 2 GPUs", 2, None)],
    "llama-65b.toml": [("2048 GPUs", 2048, 32), ("any multiple of 32 GPUs", 32, None)],
    "llama-3-8b.toml": [("8 nodes of 8", 64, 32), ("any multiple of 4 GPUs", 4, None)],
}
PARAMETERS = {"laptop.toml": "20M", "llama-7b.toml": "7B", "llama-65b.toml": "65B", "llama-3-8b.toml": "8B"}


def test_every_configuration_is_in_the_table() -> None:
    assert {path.name for path in (EXAMPLES / "configs").glob("*.toml")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_fits_the_world_size_of_its_comment(name: str) -> None:
    path = EXAMPLES / "configs" / name
    comment = " ".join(path.read_text().partition("[model]")[0].split())
    config = load_config(["--config", str(path)] + (DATA if name == "laptop.toml" else []))
    for phrase, world_size, micro_batches in CONFIGS[name]:
        assert phrase in comment
        validate(config, world_size)
        if micro_batches is not None:
            assert micro_batches_per_step(config, world_size) == micro_batches
            assert f"= {micro_batches} micro-batches" in comment
    assert PARAMETERS[name] in comment
    number, unit = float(PARAMETERS[name][:-1]), {"M": 1e6, "B": 1e9}[PARAMETERS[name][-1]]
    assert abs(parameter_count(config.model) / (number * unit) - 1) < 0.05


def test_the_command_of_the_laptop_configuration() -> None:
    text = (EXAMPLES / "configs/laptop.toml").read_text()
    flags = dict(re.findall(r"(--parallel\.\w+) (\d+)", text.partition("[model]")[0]))
    config = load_config(["--config", str(EXAMPLES / "configs/laptop.toml"), *DATA, *sum(flags.items(), ())])
    assert (config.parallel.tp, config.parallel.pp) == (2, 2)
    validate(config, 4)


@pytest.mark.parametrize(("flags", "world_size"), [([], 4), (["--parallel.tp", "1", "--parallel.pp", "1"], 2)])
def test_quickstart_configuration(flags: list[str], world_size: int) -> None:
    validate(load_config(["--config", str(EXAMPLES / "quickstart/quickstart.toml"), *DATA, *flags]), world_size)


# the job scripts; tests/jobs runs them on a real cluster

SCRIPTS = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
SUPERVISED, OF_TRAIN = ["-m", "megatron_llama.supervise", "--ranks", "4"], ["--", "train"]


def sbatch(script: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """The script as SLURM would run it, from the project's root."""
    command = ["bash", str(script), *argv]
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "70001"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, cwd=ROOT)


@pytest.mark.parametrize("script", [*SCRIPTS, EXAMPLES / "slurm/requeue.sh"], ids=lambda script: script.name)
def test_a_job_script_is_valid_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if script in SCRIPTS:
        text = script.read_text()
        for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@", "--time="):
            assert f"#SBATCH {option}" in text
        assert f"examples/slurm/{script.name}" in text
        assert ("--kill-on-bad-exit=1" in text) != (script.stem == "supervised")  # supervisors end their ranks themselves


@pytest.mark.parametrize("script", [one for one in SCRIPTS if one.stem != "llama_65b"], ids=lambda script: script.name)
def test_a_job_script_without_a_configuration(script: Path) -> None:
    result = sbatch(script)
    assert result.returncode == 2 and result.stderr.startswith("usage: ") and script.name in result.stderr


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_job_script_passes_its_arguments_on(script: Path, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands and for python: each word arrives as it was given."""
    executable(tmp_path / "scontrol", "#!/bin/sh\necho node-a\necho node-b\n")
    executable(tmp_path / "srun", '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexport SLURM_NODEID=1\nexec "$@"\n')
    python = executable(tmp_path / "python", '#!/bin/sh\nfor word; do echo "$word"; done\n')
    job = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_ARRAY_TASK_ID": "2", "PYTHON": str(python)}
    job |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GPUS_PER_NODE": "4",
        "RUN": str(tmp_path / "run"),
        "CONFIG": "a config.toml",
    }
    config = [] if script.stem == "llama_65b" else ["a config.toml"]
    result = sbatch(script, *config, "--data.train", '["x", "y z"]', **job)
    assert result.returncode == 0, result.stderr
    *words, last = result.stdout.splitlines()
    assert last == "the step ended with code 0"
    if script.stem == "many_nodes_torchrun":
        launcher = ["--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=node-a", "--master-port=20001"]
        assert words[:7] == ["-m", "torch.distributed.run", *launcher]
        words = words[7:]
    further = ["--optimizer.learning_rate", "3e-4"] if script.stem == "sweep" else []
    run = str(tmp_path / "run") + ("/3e-4" if further else "")
    program = ["-m", "megatron_llama.train"] if script.stem != "supervised" else [*SUPERVISED, "--nodes", "2", *OF_TRAIN]
    assert words == [*program, "--config", "a config.toml", "--log.directory", run, *further, "--data.train", '["x", "y z"]']


@pytest.mark.parametrize("name", ["train.sh", "supervised.sh"])
def test_a_script_for_mpirun_passes_its_arguments_on(name: str, tmp_path: Path) -> None:
    """With a stand-in for mpirun; variables that other nodes need are named to it where they are set."""
    mpirun = executable(tmp_path / "mpirun", '#!/bin/sh\nfor word; do echo "$word"; done\n')
    environment = {"PATH": os.environ["PATH"], "MPIRUN": f"{mpirun} --verbose", "PYTHON": "py", "RUN": "a run"}
    environment |= {"NCCL_SOCKET_IFNAME": "ib0", "GPUS_PER_NODE": "4", "SUPERVISE": "--grace 7"}
    line = ["bash", EXAMPLES / "mpi" / name, "my hosts", "a config.toml", "--data.train", '["x", "y z"]']
    words = subprocess.run(line, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    placed = [] if name == "train.sh" else ["--map-by", "ppr:1:node"]
    known = ["-x", "OMP_NUM_THREADS", "-x", "NCCL_SOCKET_IFNAME"]
    program = ["-m", "megatron_llama.train"] if name == "train.sh" else [*SUPERVISED, "--grace", "7", *OF_TRAIN]
    expected = ["--verbose", "--hostfile", "my hosts", *placed, "--bind-to", "none", *known, "py", *program]
    assert words == [*expected, "--config", "a config.toml", "--log.directory", "a run", "--data.train", '["x", "y z"]']


@pytest.mark.parametrize("name", ["train.sh", "supervised.sh"])
def test_a_script_for_mpirun_without_a_configuration(name: str) -> None:
    result = subprocess.run(["bash", EXAMPLES / "mpi" / name, "hosts"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f"usage: examples/mpi/{name} HOSTFILE CONFIG.toml")


def test_a_mistake_counts_whatever_code_srun_ends_with(tmp_path: Path) -> None:
    """srun ends with the code of a rank that it killed, because another one had found the mistake before."""
    executable(tmp_path / "srun", '#!/bin/sh\ntouch "$NO_RESTART_FILE"\nexit 143\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = sbatch(EXAMPLES / "slurm/many_nodes.sbatch", "config.toml", PATH=path, RUN=str(tmp_path / "run"))
    assert result.returncode == 78 and "a restart would not help" in result.stdout
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "new_checkpoint", "times_before", "requeued"),
    [
        (75, True, 3, True),
        (137, True, 3, True),
        (137, False, 0, True),
        (137, False, 3, False),
        (2, True, 0, False),
        (78, True, 0, False),
    ],
)
def test_a_job_is_requeued_while_it_makes_progress(code, new_checkpoint, times_before, requeued, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "fruitless-restarts-70001").write_text(str(times_before))
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\nkill $PPID\n')
    made = (
        f"mkdir -p {run}/checkpoints/step_00000002 && touch {run}/checkpoints/step_00000002/COMMIT; " if new_checkpoint else ""
    )
    executable(tmp_path / "srun", f"#!/bin/sh\n{made}exit {code}\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = sbatch(EXAMPLES / "slurm/many_nodes.sbatch", "config.toml", PATH=path, RUN=str(run))
    assert (tmp_path / "requeued").exists() == requeued, result.stdout
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 70001\n"
        assert (run / "fruitless-restarts-70001").read_text() == ("0\n" if new_checkpoint else f"{times_before + 1}\n")
    else:
        assert result.returncode == code


# the quickstart


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    """Short: it learns too little to pass its own check of the held-out loss, which is its last word then."""
    output = tmp_path / "quickstart"
    command = [sys.executable, EXAMPLES / "quickstart/quickstart.py", "--steps", "12", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = result.stdout[-4000:] + result.stderr[-4000:]
    assert result.returncode == 0 or "not learned more than token frequencies" in result.stderr.splitlines()[-1], said
    assert "They agree within 1e-05." in result.stdout
    assert "a unigram model of the same tokens" in result.stdout
    for name in ("tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx", "run/metrics.jsonl"):
        assert (output / name).stat().st_size > 0
    lines = [json.loads(line) for line in (output / "run-dp2/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
