"""Checkpoints of boxes: saved in one layout, loaded in any other, every byte verified. Reading order: manifest, save, load."""

from parallel.checkpoint.load import (
    committed_steps,
    load_tensors,
    newest_checkpoint,
    read_extra_file,
    read_manifest,
    resolve_checkpoint,
    step_directory,
    verify_checkpoint,
)
from parallel.checkpoint.manifest import Manifest
from parallel.checkpoint.save import save_checkpoint
from parallel.checkpoint.voting import GroupVoter, SingleProcess, Voter

__all__ = [
    "GroupVoter",
    "Manifest",
    "SingleProcess",
    "Voter",
    "committed_steps",
    "load_tensors",
    "newest_checkpoint",
    "read_extra_file",
    "read_manifest",
    "resolve_checkpoint",
    "save_checkpoint",
    "step_directory",
    "verify_checkpoint",
]
