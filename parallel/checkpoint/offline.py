"""A checkpoint of any size read and written by one process, piece by piece: for tools, where no ranks hold its tensors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.files import BytesOf
from parallel.checkpoint.load import load_tensors
from parallel.checkpoint.manifest import StoredBox, read_manifest
from parallel.checkpoint.save import Groups, commit, new_nonce, prepare, write_part
from parallel.checkpoint.steps import TEMPORARY_MARK, step_directory
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox, range_boxes

PIECE_ELEMENTS = 3 << 20  # read at a time: 12 MiB of fp32
META = torch.device("meta")  # of tensors without memory


class StepReader:
    """The tensors of a step directory by name. Every byte that is read is verified.

    `groups`: those whose files must be there; None is all. Raises CheckpointError where anything is damaged.
    """

    def __init__(self, directory: Path, groups: Collection[str] | None = None) -> None:
        self.directory, self.manifest = Path(directory), read_manifest(directory, groups)
        boxes: dict[str, list[StoredBox]] = {name: [] for name in self.manifest.tensors}
        for stored in self.manifest.boxes:
            boxes[stored.tensor].append(stored)
        self._boxes = boxes

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A box of the tensor `name`, or all of it, on the CPU in the stored dtype."""
        return self.read_together([(name, box or Box.whole(self.manifest.tensors[name].shape))])[0]

    def read_together(self, places: Sequence[tuple[str, Box]]) -> list[Tensor]:
        """Boxes of tensors likewise. A block of a file that holds several of them is read once."""
        targets = []
        for name, box in places:
            info = self.manifest.tensors[name]
            targets.append(TensorBox(name, info.shape, box, torch.empty(box.shape, dtype=info.dtype)))
        stored = [entry for name in {name for name, _ in places} for entry in self._boxes[name]]  # of many ranks' very many
        load_tensors(self.directory, targets, replace(self.manifest, boxes=stored))
        return [target.tensor for target in targets]


def pieces_of(box: Box, limit: int) -> Iterator[Box]:
    """A box cut into boxes of at most `limit` elements, in its row-major order; whole rows where they fit."""
    row = math.prod(box.shape[1:])
    step = max(limit // row * row, min(row, limit)) if row else 1
    for start in range(0, box.numel, step):
        for part, _ in range_boxes(box.shape, start, min(start + step, box.numel)):
            yield part.shifted((0,) * len(box.offset), box.offset)


def write_offline(
    root: Path, step: int, parts: Iterable[Groups], bytes_of: BytesOf, state: dict, extra_files: Mapping[str, bytes]
) -> Path:
    """Write step `step` under `root` as ranks that have `parts` would write it, one after the other; returns its directory.

    `parts`: per rank its boxes by group, each with a tensor that tells the dtype and may be on the meta device, for `bytes_of`
    gives the bytes of a box, in row-major order. What is interrupted is never visible, and swept by the next attempt.
    Raises CheckpointError where the step is there already, the parts don't make whole tensors, or nothing can be written.
    """
    final = step_directory(root, step)
    temporary = final.with_name(f"{final.name}{TEMPORARY_MARK}{new_nonce():012x}")
    try:
        prepare(Path(root), final, temporary)
        count = 0
        for groups in parts:
            write_part(temporary, count, groups, bytes_of)
            count += 1
        commit(temporary, final, step, count, state, extra_files)
    except OSError as error:
        raise CheckpointError(f"checkpoint {final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
