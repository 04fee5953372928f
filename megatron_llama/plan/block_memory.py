"""What a stage keeps of a micro-batch, and what is live at the moments of its passes in which most is.

The moments follow a backward pass through a block, operation by operation (parallel/tensor/linear.py, kernels): each has what
is left of the block's activations, what has come to wait for W, and what is in work. All in bytes of a micro-batch on one rank.

Legend: h hidden, q heads x head dim, k kv heads x head dim, f ffn, v vocabulary; q, k, f and v per tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_llama.config import RunConfig
from megatron_llama.pipeline_plan import fully_recomputed, layer_activations
from megatron_llama.plan.state_memory import BYTES, FP32, table_rows
from parallel.kernels.cross_entropy_kernels import CPU_BLOCK_BYTES, GPU_BLOCK_BYTES
from parallel.tensor.head_loss import chunk_tokens
from parallel.zero.storage import SLICES


@dataclass(frozen=True)
class Platform:
    """What kernels and messages of a kind of device allocate.

    `wide_products`: 16-bit weight gradients are made of fp32 copies of both factors. `eager_norms`: a norm's backward pass has
    three or four fp32 tensors of the activations' size. `exchanges`: sums over ranks are made of an exchange, whose pieces
    take as much as what is sent; and a message sent stays until it is answered. `block_bytes`: of fp32 values that the loss
    makes at once; `slice_elements`: that an update has in fp32 at once.
    """

    wide_products: bool
    eager_norms: bool
    exchanges: bool
    block_bytes: int
    slice_elements: int


GPU = Platform(False, False, False, GPU_BLOCK_BYTES, SLICES["cuda"])  # NCCL; cuBLAS adds to fp32, norms are fused
CPU = Platform(True, True, True, CPU_BLOCK_BYTES, SLICES["cpu"])  # gloo


class Moment(NamedTuple):
    """Bytes of the running block or head: `kept` from its forward pass, `queued` for W (only where the pass is split), `work`.

    `use`: the linear whose weight gradient is made then, of `copies` of its factors.
    """

    kept: float
    queued: float
    work: float
    use: str = ""
    copies: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Bytes of one micro-batch's tensors on one rank: a stream's part and the whole of it, q, k, f, logits, softmax sums."""

    tokens: int
    value: int
    part: float
    hidden: float
    query: float
    key: float
    ffn: float
    logits: float
    softmax: float
    tables: float  # of the rotation
    exchanged: float  # pieces of a sum over tensor ranks
    gathers: bool
    sums: bool  # over tensor ranks, into new tensors

    @property
    def gathered(self) -> float:
        """The rows of all tensor ranks, where a rank has some of them only."""
        return self.hidden if self.gathers else 0.0

    @property
    def summed(self) -> float:
        """What a sum over the tensor ranks makes."""
        return self.part + self.exchanged if self.gathers else 0.0


def sizes(config: RunConfig, platform: Platform) -> Sizes:
    """Of a micro-batch of the configuration."""
    model, tp, train = config.model, config.parallel.tp, config.train
    tokens, value = train.micro_batch_size * train.sequence_length, BYTES[train.dtype]
    split = config.parallel.sequence_parallel and tp > 1
    head_dim, unit = model.hidden_size // model.num_heads, tokens * value
    hidden = unit * model.hidden_size
    return Sizes(
        tokens=tokens,
        value=value,
        part=hidden / (tp if split else 1),
        hidden=hidden,
        query=unit * model.num_heads * head_dim / tp,
        key=unit * max(model.num_kv_heads, tp) * head_dim / tp,
        ffn=unit * model.ffn_hidden_size / tp,
        logits=unit * table_rows(model, tp),
        softmax=tokens * model.num_heads / tp * FP32,
        tables=train.sequence_length * head_dim * FP32,
        exchanged=hidden if split and platform.exchanges else 0.0,
        gathers=split,
        sums=tp > 1,
    )


def micro_batch_bytes(config: RunConfig) -> int:
    """Tokens and targets (one tensor of 8-byte ids), the mask, the same over the number of targets, and positions."""
    length = config.train.sequence_length
    return config.train.micro_batch_size * (8 * (length + 1) + 2 * FP32 * length) + 8 * length


class MicroBatchMemory:
    """What a micro-batch of a configuration takes, in its passes and between them."""

    def __init__(self, config: RunConfig, platform: Platform) -> None:
        self.config, self.platform, self.size = config, platform, sizes(config, platform)
        self._activations = {mode: layer_activations(config, mode) for mode in ("none", "full", config.parallel.recompute)}
        self._moments: dict[tuple[str, bool], tuple[Moment, ...]] = {}
        self.largest_moments: dict[tuple[str, int, bool], tuple[float, ...]] = {}  # what `peak` has found
        chunk = chunk_tokens(self.size.tokens, int(self.size.logits / self.size.tokens))
        self.head_chunk = 0 if chunk == self.size.tokens else chunk  # tokens; 0 where the head is in one piece

    def kept(self, mode: str) -> float:
        """What a block keeps from F to its backward pass."""
        return self._activations[mode][0]

    @property
    def queued(self) -> float:
        """What a block leaves from I to W: the inputs and output gradients of its linears."""
        return self._activations["none"][1]

    def modes(self, layers: int) -> list[str]:
        """What becomes of the activations of each of a stage's blocks."""
        full = fully_recomputed(self.config.parallel, layers)
        others = "none" if self.config.parallel.recompute == "full" else self.config.parallel.recompute
        return ["full"] * full + [others] * (layers - full)

    def kept_by_stage(self, layers: int, last: bool) -> float:
        """What a stage keeps from F on: its blocks' activations, the rotary tables, the last norm and the logits.

        Of a head in chunks that is dx; `head_gradient` comes once per rank.
        """
        size = self.size
        kept = sum(self.kept(mode) for mode in self.modes(layers)[self.config.parallel.offload_layers :]) + size.tables
        if last:
            kept += size.part + (size.hidden if self.head_chunk else size.part + size.logits)
        return kept

    def queued_by_stage(self, layers: int, last: bool) -> float:
        """What waits from I to W; of the head in one piece, too."""
        return layers * self.queued + (self.size.part + self.size.logits if last and not self.head_chunk else 0.0)

    @property
    def head_gradient(self) -> float:
        """The weight gradient of a head in chunks, which waits between the passes of one micro-batch at a time."""
        return self._columns * self.config.model.hidden_size * FP32 if self.head_chunk else 0.0

    @property
    def _columns(self) -> float:
        return self.size.logits / self.size.tokens / self.size.value

    def _copies(self, *factors: float) -> float:
        """fp32 copies of the factors of a weight gradient."""
        wide = self.platform.wide_products and self.size.value != BYTES[self.config.zero.gradient_dtype]
        return sum(factors) / self.size.value * FP32 if wide else 0.0

    def _norm_bytes(self) -> float:
        """fp32 tensors of a norm's backward pass: x / rms(x), the gradient before and after the weight, and a product."""
        if not self.platform.eager_norms:
            return self.size.part
        return self.size.part / self.size.value * FP32 * (4 if self.size.value < FP32 else 3)

    @cached_property
    def head_moments(self) -> tuple[Moment, ...]:
        """The loss's gradient, by blocks of fp32 values; the head's two gradients; the norm. `kept` is what has gone by then.

        In chunks the first is in the forward pass, and the backward pass scales dx.
        """
        size = self.size
        tokens = self.head_chunk or size.tokens
        block = min(tokens, max(1, self.platform.block_bytes // int(FP32 * self._columns))) * self._columns * FP32
        if self.head_chunk:
            logits, x = size.logits * tokens / size.tokens, size.hidden * tokens / size.tokens
            chunk = size.part + size.gathered + logits + max(block, self._copies(logits, x))
            return (Moment(0.0, 0.0, chunk), Moment(0.0, 0.0, size.summed))
        products = size.hidden + size.gathered + size.summed
        gone = size.logits + size.part
        return (
            Moment(0.0, 0.0, block),
            Moment(0.0, 0.0, products, "head", self._copies(size.logits, size.hidden)),
            Moment(gone, gone, size.part + self._norm_bytes(), "norm"),
        )

    def block_moments(self, mode: str, split: bool) -> tuple[Moment, ...]:
        """The backward pass of a block. `split`: its linears leave their inputs and output gradients to W."""
        key = mode, split
        if key not in self._moments:
            self._moments[key] = self._in_i(mode) if split else self._in_b(mode)
        return self._moments[key]

    def _in_b(self, mode: str) -> tuple[Moment, ...]:
        """In order: w2's gradients, SwiGLU's, those of w1 and w3, the norm's, those of wo, and of wqkv.

        The gradient of the block's output is not counted: it is another block's, or a message. What a pass makes again is in
        work.
        """
        size, copies = self.size, self._copies
        part, hidden, query, key, ffn = size.part, size.hidden, size.query, size.key, size.ffn
        kept = self.kept(mode)
        whole = self.kept("none") if mode == "full" else kept
        lacks = mode == "linear_outputs"  # the inputs of w2 and of the fused projections, which are made again
        product, normed = (0.0, 0.0) if lacks else (ffn, part)
        after_swiglu = whole - product - 2 * ffn
        after_norm = after_swiglu - normed - part
        rows, summed = size.gathered, size.summed
        moments = (
            (whole, rows + ffn + (ffn - product), "w2", copies(hidden, ffn)),
            (whole - product, 4 * ffn, "", 0.0),
            (after_swiglu, 2 * ffn + hidden + rows + summed + (part - normed), "w13", copies(2 * ffn, hidden)),
            (after_swiglu - normed, part + self._norm_bytes(), "", 0.0),
            (after_norm, part + rows + query, "wo", copies(hidden, query)),
            (part + normed, part + query + 2 * key + hidden + rows + summed, "wqkv", copies(query + 2 * key, hidden)),
        )
        return tuple(Moment(min(left, kept), 0.0, work + left - min(left, kept), *use) for left, work, *use in moments)

    def _in_i(self, mode: str) -> tuple[Moment, ...]:
        """SwiGLU's gradient, that of the inputs of w1 and w3, and the end of the block.

        Of what is made again the linears' inputs wait, too.
        """
        size, kept = self.size, self.kept(mode)
        ffn, inputs = size.ffn, 2 * size.part + size.query + size.ffn
        waits, again = size.part + size.gathered + 2 * ffn, 0.0
        if mode == "full":
            again = self.kept("none") - kept - inputs
            waits += inputs
        elif mode == "linear_outputs":
            waits += ffn
        gradient = size.part if size.gathers else 0.0  # of the output, beside that of all rows
        swiglu = Moment(kept, waits, 2 * ffn + again + gradient)
        after = Moment(kept - 2 * ffn, waits, size.hidden + size.summed + gradient)
        return (swiglu, *(() if mode == "full" else (after,)), Moment(0.0, self.queued, size.part))
