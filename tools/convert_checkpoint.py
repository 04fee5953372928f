"""Converts checkpoints between our format and those of other programs, in the memory of a few tensors.

    python tools/convert_checkpoint.py --from hf --to native Llama-3.2-1B/ weights/
    python tools/convert_checkpoint.py --from native --to hf --dtype bf16 --verify runs/laptop hf/
    python tools/convert_checkpoint.py --from meta --to native llama-2-7b/ weights/ --model llama-2-7b
    python tools/convert_checkpoint.py --from native --to megatron --tp 4 runs/laptop megatron/

A native source is a step directory, a folder of checkpoints or a run directory, of which the newest is taken. With --verify
the logits of source and result are compared; the exit code is 1 where they are not those of the same model. AdamW's moments
go with the weights between native, deepspeed and dcp; the other formats hold weights only.

formats:
  native               ours: weights, and AdamW's moments
  hf                   Hugging Face: config.json, safetensors or pytorch_model.bin, tokenizer files
  meta                 Meta: consolidated.NN.pth and params.json; --tp parts
  megatron             Megatron-Core's torch_dist, as a release; its vocabulary padded for --tp
  megatron-legacy      Megatron-LM's mp_rank_XX; --tp x --pp parts
  deepspeed-universal  DeepSpeed's universal checkpoint
  deepspeed-zero       ZeRO checkpoints of transformers + DeepSpeed runs, stages 1 to 3 (read only)
  dcp                  PyTorch's distributed checkpoint, as torchtitan reads it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

try:
    import torch
    from tqdm import tqdm

    from megatron_llama.config import ModelConfig, load_config, validate_model
    from megatron_llama.interop.formats import MODULES, convert, open_stored
    from megatron_llama.interop.hugging_face_tokenizer import with_tokenizer
    from megatron_llama.interop.safetensors_files import stored_bytes
    from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor
    from megatron_llama.interop.verify import Side, compare
    from megatron_llama.runtime import DTYPES
    from megatron_llama.tokenizer import Tokenizer
    from megatron_llama.tool_frame import run_tool
    from parallel.checkpoint.manifest import dtype_name
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WEIGHTS_ONLY = ("hf", "meta", "megatron", "megatron-legacy")
SPLIT_BY = {"meta": ("tp",), "megatron": ("tp",), "megatron-legacy": ("tp", "pp")}
DIFFERENT = 1  # exit code where --verify finds another model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="a new directory")
    parser.add_argument("--from", dest="source_format", required=True, choices=MODULES, metavar="FORMAT")
    parser.add_argument("--to", dest="result_format", required=True, choices=MODULES, metavar="FORMAT")
    parser.add_argument("--dtype", choices=DTYPES, help="numbers of the written weights (default: the source's)")
    parser.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor-parallel size that the result is made for")
    parser.add_argument("--pp", type=_count, default=1, metavar="N", help="pipeline parts of the result")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PRESET", help="the architecture, for a source that does not tell it")
    model.add_argument("--config", metavar="FILE", help="the same, by the TOML configuration of a run")
    parser.add_argument("--tokenizer", metavar="FILE|none", help="the tokenizer to go with it (default: the source's)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="step of a native result (default 0)")
    parser.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of one safetensors file (5GB)")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="of the Megatron-LM run that will read a megatron-legacy result (its own flag and default)",
    )
    parser.add_argument("--verify", action="store_true", help="compare the logits of source and result")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _size(text: str) -> int:
    """`5GB` -> bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?B|B)", text.upper())
    if not found or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    return size


def architecture(arguments: argparse.Namespace) -> ModelConfig | None:
    """What --model or --config says. Raises ConfigError."""
    if not arguments.model and not arguments.config:
        return None
    flags = ["--model.preset", arguments.model] if arguments.model else ["--config", arguments.config]
    config = load_config(flags)
    validate_model(config)
    return config.model


def check_split(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a --tp or --pp that would change nothing."""
    for flag in ("tp", "pp"):
        if getattr(arguments, flag) > 1 and flag not in SPLIT_BY.get(arguments.result_format, ()):
            text = f"--{flag} {getattr(arguments, flag)}: the format {arguments.result_format} is the same for every {flag}"
            raise ConfigError(f"{text}; leave it out")


def with_other_tokenizer(stored: StoredModel, given: str) -> StoredModel:
    """The model with the tokenizer in the file `given`, or with none. Raises ConfigError and DataError."""
    if given == "none":
        return replace(stored, files=with_tokenizer(stored.files, None))
    tokenizer = Tokenizer(given)
    if tokenizer.vocab_size > stored.model.vocab_size:
        raise ConfigError(
            f"--tokenizer {given} has {tokenizer.vocab_size} pieces, and the model a vocabulary of {stored.model.vocab_size}: "
            "give the one with which it was trained"
        )
    return replace(stored, files=with_tokenizer(stored.files, tokenizer.content))


def counted(stored: StoredModel, update: Callable[[int], object]) -> StoredModel:
    """The same model; `update` is called with the bytes of each tensor that is read."""

    def count(tensor: StoredTensor) -> StoredTensor:
        def read() -> torch.Tensor:
            found = tensor.read()
            update(stored_bytes(tensor))
            return found

        return replace(tensor, read=read)

    parts = {name: {key: count(tensor) for key, tensor in getattr(stored, name).items()} for name in ("weights", "optimizer")}
    return replace(stored, **parts)


def describe(stored: StoredModel) -> str:
    """One line: parameters, numbers, size, and what comes with them."""
    tensors = stored.weights.values()
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    dtypes = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
    text = f"{parameters:,} parameters in {dtypes} ({_bytes(sum(map(stored_bytes, tensors)))})"
    if stored.optimizer:
        size = _bytes(sum(map(stored_bytes, stored.optimizer.values())))
        text += f"; AdamW's moments after {stored.optimizer_steps} updates ({size})"
    return f"{text}; {', '.join(sorted(stored.files))}" if stored.files else text


def _bytes(size: int) -> str:
    unit = next(unit for unit in ("GB", "MB", "KB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:,.1f} {unit}" if unit != "B" else f"{size} B"


def main() -> int:
    arguments = parse_arguments()
    check_split(arguments)
    options = Options(
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        tp=arguments.tp,
        pp=arguments.pp,
        model=architecture(arguments),
        step=arguments.step,
        max_shard_bytes=arguments.max_shard_size,
        transformer_impl=arguments.transformer_impl,
    )
    source = open_stored(arguments.source_format, arguments.source, options)
    print(f"{arguments.source} ({arguments.source_format}): {describe(source)}", flush=True)
    written = with_other_tokenizer(source, arguments.tokenizer) if arguments.tokenizer else source
    if written.optimizer and arguments.result_format in WEIGHTS_ONLY:
        print(f"AdamW's moments are left behind: {arguments.result_format} holds weights only", flush=True)
        written = replace(written, optimizer={}, optimizer_steps=0)
    total = sum(stored_bytes(tensor) for part in (written.weights, written.optimizer) for tensor in part.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        convert(counted(written, bar.update), arguments.result_format, arguments.destination, options)
    files = [path for path in arguments.destination.rglob("*") if path.is_file()]
    size = _bytes(sum(path.stat().st_size for path in files))
    print(f"{arguments.destination} ({arguments.result_format}): {size} in {len(files)} files", flush=True)
    return verify(arguments, source, options) if arguments.verify else 0


def verify(arguments: argparse.Namespace, source: StoredModel, options: Options) -> int:
    """Print how far the result is from the source; returns the exit code."""
    result = open_stored(arguments.result_format, arguments.destination, replace(options, model=source.model))
    sides = (
        Side(arguments.source_format, arguments.source, source),
        Side(arguments.result_format, arguments.destination, result),
    )
    comparison = compare(*sides, options.dtype)
    print(f"verify: {comparison}: {'the same model' if comparison.same else 'NOT THE SAME MODEL'}")
    return 0 if comparison.same else DIFFERENT


if __name__ == "__main__":
    run_tool(main)
