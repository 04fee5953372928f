"""The whole road on one machine: text, tokenizer, dataset, training, a change of layout, evaluation, sampling, a picture.

Real text that every machine has (Python's own sources and documentation) trains a small LLaMA on four processes as
tensor 2 x pipeline 2 with sequence parallelism; the run goes on as data parallel 2 from the same checkpoint, and its losses are
compared with those of the first layout. Every step is a command that you could type: it is printed before it runs.

    make quickstart                     or: python examples/quickstart/quickstart.py [--output DIR] [--steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_llama.data.indexed import IndexedDataset

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("quickstart.toml")
TEXT_BYTES = 8_000_000
COMPARED_STEPS = 3
AGREEMENT = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder for everything it makes")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default 240); the layout changes at two thirds")
    arguments = parser.parse_args()
    started = time.perf_counter()
    output, steps = arguments.output, arguments.steps
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    switch = steps * 2 // 3

    say("1. Real text: Python's own sources and documentation")
    collect_text(output)
    say("2. Tokenizer: sentencepiece BPE with LLaMA's settings")
    run_tool("train_tokenizer.py", "--input", output / "train.jsonl", "--output", output / "tokenizer", "--vocab-size", 2048)
    say("3. Indexed datasets")
    for name in ("train", "valid"):
        run_tool(
            "preprocess_data.py", "--input", output / f"{name}.jsonl", "--output-prefix", output / name,
            "--tokenizer-model", output / "tokenizer.model", "--append-bos", "--append-eos", "--workers", 2,
        )  # fmt: skip
    say(f"4. Training as tensor 2 x pipeline 2 on 4 processes, to step {switch + COMPARED_STEPS}")
    first, second = output / "run", output / "run-dp2"
    common = [
        *("--config", CONFIG, "--data.train", output / "train", "--data.valid", output / "valid"),
        *("--data.tokenizer", output / "tokenizer.model", "--train.steps", steps, "--checkpoint.save_every", switch),
        *("--optimizer.warmup_steps", min(20, steps // 6)),
        *("--train.device", "auto" if torch.cuda.device_count() >= 4 else "cpu"),
    ]
    train(4, *common, "--log.directory", first, "--train.exit_step", switch + COMPARED_STEPS)

    say(f"5. The same run from step {switch} on as data parallel 2 (tensor 1, pipeline 1), on 2 processes")
    checkpoint = first / "checkpoints" / f"step_{switch:08d}"
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    layout = ["--parallel.tp", 1, "--parallel.pp", 1, "--checkpoint.load", checkpoint, "--log.directory", second]
    train(2, *common, *layout)
    compare_layouts(first, second, switch)

    say("6. What it has learned")
    picture = draw(output, first, second, switch)
    report_losses(output, second)
    prompt = "def __init__(self, "
    run(sys.executable, "-m", "megatron_llama.generate", "--checkpoint", second, "--prompt", prompt, "--max-tokens", 48)
    minutes, seconds = divmod(time.perf_counter() - started, 60)
    say(f"Done in {minutes:.0f} min {seconds:.0f} s. Loss curve: {shown(picture)}; run: {shown(second)}")


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)


def run(*command: object) -> None:
    """Print a command, run it, and stop where it fails."""
    words = [str(word) for word in command]
    words = [shown(Path(word)) if word.startswith(str(ROOT)) else word for word in words]
    print("$ " + shlex.join(["python" if word == shown(Path(sys.executable)) else word for word in words]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run([str(word) for word in command], env=environment)
    if result.returncode:
        sys.exit(f"quickstart: the command above failed with exit code {result.returncode}")


def run_tool(name: str, *arguments: object) -> None:
    run(sys.executable, ROOT / "tools" / name, *arguments)


def train(processes: int, *arguments: object) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    run(*launcher, "-m", "megatron_llama.train", *arguments)


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of Python's library sources and of the language's help topics, without its test suites."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "idlelib", "__pycache__", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not left_out.intersection(name.parts):
            yield str(name), path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def collect_text(output: Path) -> None:
    """Write train.jsonl and valid.jsonl; a document's name decides, by its hash, to which it belongs (1 in 20 is held out)."""
    sizes: Counter[str] = Counter()
    with open(output / "train.jsonl", "w") as train_file, open(output / "valid.jsonl", "w") as valid_file:
        for name, text in sorted(documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest()):
            held_out = hashlib.sha256(b"split" + name.encode()).digest()[0] < 13
            part, file = ("valid", valid_file) if held_out else ("train", train_file)
            if sizes["train"] < TEXT_BYTES:
                file.write(json.dumps({"text": text, "name": name}) + "\n")
                sizes[part] += len(text.encode(errors="replace"))
                sizes[f"{part} documents"] += 1
    for part in ("train", "valid"):
        print(f"{part}: {sizes[f'{part} documents']} documents, {sizes[part] / 1e6:.1f} MB")


def read_metrics(run_directory: Path, field: str) -> dict[int, Any]:
    """A field of metrics.jsonl by step."""
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[field] for record in records if field in record}


def compare_layouts(first: Path, second: Path, switch: int) -> None:
    """Print the losses right after the change in both layouts, and stop where they differ."""
    before, after = read_metrics(first, "loss"), read_metrics(second, "loss")
    print("\nThe next losses in both layouts, from the same checkpoint:")
    print(f"{'step':>6}  {'tp 2 x pp 2':>20}  {'dp 2':>20}  {'difference':>10}")
    worst = 0.0
    for step in range(switch + 1, switch + 1 + COMPARED_STEPS):
        worst = max(worst, abs(before[step] - after[step]))
        print(f"{step:>6}  {before[step]:>20.15f}  {after[step]:>20.15f}  {abs(before[step] - after[step]):>10.1e}")
    if worst > AGREEMENT:
        sys.exit(f"quickstart: the layouts differ by {worst}, more than {AGREEMENT}: this is a bug, please report it")
    print(f"They agree within {AGREEMENT}.")


def unigram_loss(output: Path) -> float:
    """Nats per token, on the targets that the held-out loss is of, of a model that knows only the training tokens' counts."""
    config = tomllib.loads(CONFIG.read_text())
    length, vocabulary = config["train"]["sequence_length"], config["model"]["vocab_size"]
    train_data, valid_data = IndexedDataset(output / "train"), IndexedDataset(output / "valid")
    counts = np.bincount(train_data.read(0, train_data.num_tokens), minlength=vocabulary) + 1
    windows = (valid_data.num_tokens - 1) // length
    held_out = np.bincount(valid_data.read(1, windows * length), minlength=vocabulary)
    return float(-(held_out * np.log(counts / counts.sum())).sum() / held_out.sum())


def report_losses(output: Path, run_directory: Path) -> None:
    """Print the held-out loss beside a unigram model's."""
    (values,) = list(read_metrics(run_directory, "valid").values())[-1].values()  # of the one held-out dataset
    held_out, unigram = values["loss"], unigram_loss(output)
    print(f"held-out loss: {held_out:.4f} nats/token, {values['bits_per_byte']:.4f} bits per byte of text")
    print(f"a unigram model of the same tokens: {unigram:.4f}; a uniform one: {log(2048):.4f}")
    if held_out > unigram - 0.5:
        print("That is less than half a nat below: train for more steps to learn more than token frequencies.")


def draw(output: Path, first: Path, second: Path, switch: int) -> Path:
    """The loss curve of both layouts as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    before, after = read_metrics(first, "loss"), read_metrics(second, "loss")
    unigram = unigram_loss(output)
    held_out = read_metrics(second, "valid_loss")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    later = {step: loss for step, loss in after.items() if step > switch}
    axes.plot(list(later), list(later.values()), color="#D55E00", label="tp 1 x pp 1 x dp 2, resumed")
    axes.plot(list(before), list(before.values()), color="#0072B2", label="tp 2 x pp 2, sequence parallel")
    axes.axvline(switch, color="0.6", linestyle=":", label=f"layout changed after step {switch}")
    axes.axhline(unigram, color="0.3", linestyle="--", label=f"unigram model, held out: {unigram:.2f}")
    final = list(held_out.values())[-1]
    axes.plot(list(held_out), list(held_out.values()), "k*", markersize=10, label=f"held out: {final:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="A small LLaMA on Python's sources: one run, two layouts")
    axes.legend()
    path = output / "loss.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
