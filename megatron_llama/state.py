"""What a checkpoint of a run holds, and how a run takes it up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_llama.code_version import code_version
from megatron_llama.config import ModelConfig, RunConfig, checkpoint_directory, from_dict, to_dict, tokens_per_step
from megatron_llama.interop.stored_model import logical_shapes
from megatron_llama.runtime import Runtime
from megatron_llama.watching.watch import Watch
from parallel.checkpoint.background import BackgroundSaver
from parallel.checkpoint.load import load_tensors
from parallel.checkpoint.manifest import Manifest, read_manifest
from parallel.checkpoint.readers import Readers
from parallel.checkpoint.recovery import newest_good_step
from parallel.checkpoint.save import Groups, save_checkpoint
from parallel.checkpoint.steps import resolve_checkpoint
from parallel.checkpoint.voting import GroupVoter, SingleProcess, Voter
from parallel.errors import CheckpointError
from parallel.shards import TensorBox
from parallel.zero.engine import Engine

TOKENIZER_FILE = "tokenizer.model"


SKIP, GO_BACK = "skipped", "went back"  # what a run does about samples that it leaves out


class SkippedSamples(NamedTuple):
    """Samples `first` to `stop` - 1, which a run has left out at `step`; the `reason` begins with what it did."""

    first: int
    stop: int
    step: int
    reason: str

    @property
    def went_back(self) -> bool:
        """Whether no step counts them: the run went back, and on behind them."""
        return self.reason.startswith(GO_BACK)


@dataclass(frozen=True)
class Position:
    """Where a run is: updates done (skipped ones too), samples read or left out, tokens trained on (or skipped in a step)."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_samples: tuple[SkippedSamples, ...] = ()

    def after(self, config: RunConfig) -> Position:
        """One step further."""
        tokens = self.tokens + tokens_per_step(config)
        return replace(self, step=self.step + 1, samples=self.samples + config.train.global_batch_size, tokens=tokens)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Position:
        """That of a checkpoint's state."""
        position = state["position"]
        return cls(**{**position, "skipped_samples": tuple(SkippedSamples(*s) for s in position.get("skipped_samples", ()))})


def voter(runtime: Runtime) -> Voter:
    """All ranks of the run, for saving."""
    return GroupVoter(heartbeat=runtime.groups.ledger.heartbeat) if dist.is_initialized() else SingleProcess()


def save_state(
    runtime: Runtime,
    engine: Engine,
    position: Position,
    dataset: dict[str, Any],
    tokenizer: bytes | None,
    watch: Watch | None = None,
) -> Path:
    """Save weights, optimizer state, position and what is `watch`ed. All ranks call it together.

    Raises CheckpointError on all of them.
    """
    root, groups, state, options = _contents(runtime, engine, position, dataset, tokenizer, watch)
    return save_checkpoint(root, position.step, groups(), state, world=voter(runtime), **options)


def start_save(
    saver: BackgroundSaver,
    runtime: Runtime,
    engine: Engine,
    position: Position,
    dataset: dict[str, Any],
    tokenizer: bytes | None,
    watch: Watch | None = None,
) -> torch.cuda.Event | None:
    """Let `saver` save what `save_state` saves. Returns what the next update is to wait for on the device, if anything."""
    root, groups, state, options = _contents(runtime, engine, position, dataset, tokenizer, watch)
    return saver.start(root, position.step, groups, state, **options)


def _contents(
    runtime: Runtime,
    engine: Engine,
    position: Position,
    dataset: dict[str, Any],
    tokenizer: bytes | None,
    watch: Watch | None,
) -> tuple[Path, Callable[[], Groups], dict[str, Any], dict[str, Any]]:
    """Where to save, what makes the boxes, the manifest's state, and the options of a save."""
    engine.finish()
    config = runtime.config
    state = {
        "position": dataclasses.asdict(position),
        "optimizer_steps": engine.optimizer_steps,
        "loss_scale": engine.loss_scale.state if engine.loss_scale is not None else None,
        "watch": watch.state if watch is not None else None,
        "config": to_dict(config),
        "world_size": runtime.groups.topology.world_size,
        "dataset": dataset,
        "code": code_version() if runtime.groups.world.rank == 0 else "",  # rank 0 writes the manifest
    }

    def groups() -> Groups:
        return {"weights": engine.weight_boxes(write=True), "optimizer": engine.optimizer_boxes(write=True)}

    options = {
        "extra_files": {TOKENIZER_FILE: tokenizer} if tokenizer is not None else None,
        "keep": config.checkpoint.keep,
        "keep_every": config.checkpoint.keep_every,
    }
    return checkpoint_directory(config), groups, state, options


def find_checkpoint(config: RunConfig) -> Path | None:
    """The step directory that `checkpoint.load` asks for, or None for a fresh start. Raises CheckpointError."""
    if config.checkpoint.load == "none":
        return None
    if config.checkpoint.load == "auto":
        return newest_good_step(checkpoint_directory(config))[0]
    return resolve_checkpoint(Path(config.checkpoint.load))


def fresh_position(config: RunConfig) -> Position:
    """Where a run begins that has no checkpoint."""
    return Position(samples=config.data.first_sample)


def stored_position(config: RunConfig) -> tuple[Position, dict[str, Any] | None]:
    """Where the run will go on, and the state of the training data there (None at a fresh start). Raises CheckpointError."""
    directory = find_checkpoint(config)
    if directory is None:
        return fresh_position(config), None
    state = read_manifest(directory).state
    return Position.from_state(state), state["dataset"]


def load_state(
    directory: Path, runtime: Runtime, engine: Engine, readers: Readers | None = None, watch: Watch | None = None
) -> Position:
    """Load a checkpoint, made in whatever layout, into this one: weights, optimizer state, position and what is `watch`ed.

    `readers`: the ranks that load together; None: each on its own. Raises CheckpointError where it is of another model, and
    DamagedError where it is damaged: then another one may be loaded instead, as a load fills everything anew.
    """
    readers = readers or Readers()

    def read() -> Manifest:
        manifest = read_manifest(directory)
        check_model(directory, manifest, runtime.config.model)
        return manifest

    manifest = readers.together(read)
    engine.load(lambda boxes: load_tensors(directory, boxes, manifest, readers))
    engine.optimizer_steps = manifest.state["optimizer_steps"]
    stored_scale = manifest.state.get("loss_scale")
    if engine.loss_scale is not None and stored_scale is not None:
        engine.loss_scale.state = stored_scale
    stored_watch = manifest.state.get("watch")
    if watch is not None and stored_watch is not None:
        watch.state = stored_watch
    return Position.from_state(manifest.state)


def start_from_weights(directory: Path, runtime: Runtime, engine: Engine, readers: Readers) -> None:
    """Load the weights of a checkpoint, stored in whatever precision, and leave the optimizer as new.

    All ranks call it together. Raises CheckpointError where it is damaged, of another model, or holds no weights.
    """

    def read() -> Manifest:
        manifest = read_manifest(directory, groups=("weights",))
        check_model(directory, manifest, runtime.config.model, "leave out --checkpoint.weights_from")
        return manifest

    manifest, names = readers.together(read), logical_shapes(runtime.config.model).keys()

    def fill(boxes: Iterable[TensorBox]) -> None:
        weights = (box for box in boxes if box.name in names)
        load_tensors(directory, weights, manifest, readers, widen=True)

    engine.load(fill)


def stored_config(directory: Path, manifest: Manifest) -> RunConfig:
    """The configuration of the run that wrote the checkpoint."""
    if "config" not in manifest.state:
        raise CheckpointError(f"{directory}: the manifest holds no configuration; it was not written by a training run")
    return from_dict(manifest.state["config"], origin=str(directory))


def check_model(
    directory: Path, manifest: Manifest, model: ModelConfig, instead: str = "--checkpoint.load none to start afresh"
) -> None:
    """Raise CheckpointError naming every size in which the checkpoint's model differs from this one."""
    stored = stored_config(directory, manifest).model
    ignored = ("preset", "init_std")
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in ignored]
    different = [name for name in names if getattr(stored, name) != getattr(model, name)]
    if different:
        listed = ", ".join(f"model.{n} = {getattr(stored, n)} (this run has {getattr(model, n)})" for n in different)
        raise CheckpointError(
            f"{directory} is a checkpoint of another model: {listed}; set these fields as in the checkpoint, "
            f"or {instead}"
        )


@torch.no_grad()
def load_weights(directory: Path, runtime: Runtime, manifest: Manifest) -> None:
    """Load the weights alone, for evaluation and generation, one parameter at a time."""
    for chunk in runtime.chunks:
        for parameter in chunk.parameters():
            wide = torch.zeros(parameter.shape, dtype=torch.float32)  # checkpoints hold fp32, or less where they were converted
            boxes = [
                TensorBox(s.name, s.global_shape, s.box, wide[s.local.slices()]) for s in parameter.shard.segments
            ]
            load_tensors(directory, boxes, manifest, widen=True)
            parameter.copy_(wide)
