"""What may go wrong with a layout, in one line each."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llama.plan.configured import Prediction
from megatron_llama.plan.kernels import ALIGNMENT

FULL = 0.92  # of the memory: beyond, allocators stall and steps become slow or fail
DEAR_HEAD = 0.05  # of the step


def risks(prediction: Prediction) -> Iterator[str]:
    """Each risk of a layout, with its numbers and what would help."""
    job, layout, shape = prediction.job, prediction.job.layout, prediction.job.shape
    if prediction.fill > FULL:
        yield f"memory is {prediction.fill:.0%} full: allocators stall above {FULL:.0%}; recompute more or raise tp or pp"
    if layout.tp > job.cluster.gpus_per_node:
        yield f"tp {layout.tp} crosses nodes of {job.cluster.gpus_per_node} GPUs: its collectives go over the network"
    sizes = {"hidden_size / tp": shape.hidden_size / layout.tp, "ffn_hidden_size / tp": shape.ffn_hidden_size / layout.tp}
    for name, size in sizes.items():
        if size % ALIGNMENT:
            yield f"{name} = {size:g} is no multiple of {ALIGNMENT}: its products waste part of each tile"
    if shape.head_dim % 8:
        yield f"heads of {shape.head_dim} numbers are no multiple of 8: tensor cores cannot be used for attention"
    elif shape.head_dim not in (64, 128):
        yield f"heads of {shape.head_dim} numbers: attention kernels are made for 64 and 128"
    if layout.schedule == "interleaved" and layout.micro_batches % layout.pp:
        yield f"{layout.micro_batches} micro-batches are no multiple of pp {layout.pp}: interleaving leaves places empty"
    share = prediction.time.head / prediction.time.total
    if layout.pp > 1 and share > DEAR_HEAD:
        yield f"the head takes {share:.0%} of the last rank's step; parallel.layers_per_stage can give it fewer layers"
    if prediction.bubble > 0.15:
        yield f"{prediction.bubble:.0%} of the step is waiting: more micro-batches, more chunks or a smaller pp help"


def reasons(prediction: Prediction) -> str:
    """Why a layout is as fast as it is: the largest losses beside the model's own products and attention."""
    time = prediction.time
    names = {
        "tensor": "tensor-parallel communication",
        "bubble": "bubble",
        "recompute": "recomputation",
        "data": "data-parallel communication",
        "pipeline": "sends between stages",
        "elementwise": "elementwise work",
        "head": "head",
        "optimizer": "optimizer",
        "jitter": "waiting for slower nodes",
        "context": "context-parallel communication",
    }
    shares = sorted(((getattr(time, name) / time.total, text) for name, text in names.items()), reverse=True)
    return ", ".join(f"{text} {share:.1%}" for share, text in shares[:4] if share >= 0.005)
