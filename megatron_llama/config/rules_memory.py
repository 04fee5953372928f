"""Rules about recomputation, offload, float8 and CUDA graphs. Each raises ConfigError, as in `rules`."""

from __future__ import annotations

from megatron_llama.config.sections import RunConfig, data_parallel_size, micro_batches_per_step
from parallel.errors import ConfigError

MULTIPLE = 16  # of the sizes of a float8 product: what the tensor cores take
LEAST_GRAPHED = 3  # micro-batches of a step: its first and last one run eagerly


def recompute_layers(config: RunConfig) -> None:
    """`parallel.recompute_layers` goes with recompute = full."""
    parallel = config.parallel
    if parallel.recompute_layers and parallel.recompute != "full":
        raise ConfigError(
            f"parallel.recompute_layers = {parallel.recompute_layers} says how far parallel.recompute = full goes, and "
            f"parallel.recompute = {parallel.recompute}: set --parallel.recompute_layers 0, or --parallel.recompute full"
        )


def rematerialization(config: RunConfig) -> None:
    """Norms that are made again need their weights in the backward pass."""
    if config.parallel.recompute == "linear_outputs" and config.zero.stage == 3:
        raise ConfigError(
            "parallel.recompute = linear_outputs makes norms again without asking for their weights, which zero.stage = 3 has "
            "taken away by then: set --parallel.recompute full, or --zero.stage 2"
        )


def float8(config: RunConfig) -> None:
    """What float8 products ask of the run, whatever the GPU."""
    train, overlap = config.train, config.parallel.tp_overlap
    if train.float8 == "none":
        return
    if train.dtype != "bf16":
        raise ConfigError(
            f"train.float8 = {train.float8} makes bf16 outputs, and train.dtype = {train.dtype}: set --train.dtype bf16"
        )
    if config.parallel.tp > 1 and overlap not in ("none", "backward"):
        raise ConfigError(
            f"train.float8 = {train.float8} scales whole operands, and parallel.tp_overlap = {overlap} cuts them in pieces: "
            "set --parallel.tp_overlap backward"
        )
    sizes = {f"the {part} of {name}": size for name, sizes in float8_linears(config).items() for part, size in sizes.items()}
    if train.float8 == "tensorwise":  # whose weight gradients sum over tokens in float8 too
        sizes["micro_batch_size x sequence_length"] = train.micro_batch_size * train.sequence_length
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ConfigError(
                f"train.float8 = {train.float8} needs products whose sizes are multiples of {MULTIPLE}; {name} are {size} on a "
                f"rank of tp {config.parallel.tp}: set --train.float8 none"
            )


def float8_linears(config: RunConfig) -> dict[str, dict[str, int]]:
    """A rank's inputs and outputs of each linear of a block."""
    model, tp = config.model, config.parallel.tp
    query, key = (heads * model.head_dim // tp for heads in (model.num_heads, max(model.num_kv_heads, tp)))
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tp
    sizes = {"wqkv": (hidden, query + 2 * key), "wo": (query, hidden), "w1 and w3": (hidden, 2 * ffn), "w2": (ffn, hidden)}
    return {name: {"inputs": inputs, "outputs": outputs} for name, (inputs, outputs) in sizes.items()}


def float8_advice(config: RunConfig) -> list[str]:
    """What to say of linears that are likely to be slower in float8; nothing where there are none."""
    recipe, linears = config.train.float8, float8_linears(config)
    if recipe == "none":
        return []
    slower = [f"{name} ({size['inputs']} x {size['outputs']})" for name, size in linears.items() if rather_not(recipe, **size)]
    return (
        [f"train.float8 = {recipe} is likely to be slower than bf16 for {', '.join(slower)} (inputs x outputs)"]
        if slower
        else []
    )


def rather_not(recipe: str, inputs: int, outputs: int) -> bool:
    """Whether a linear of that size is likely to be slower in float8, scaling included, on an H100.

    Source: the thresholds by which torchao 0.18 leaves linears out (`_auto_filter_for_recipe`), measured on H100s.
    """
    if recipe == "tensorwise":
        return inputs <= 4096 and outputs <= 1024
    return outputs <= 2048 or inputs <= 1024 or (outputs <= 4096 and inputs <= 2048)


def cuda_graphs(config: RunConfig, world_size: int) -> None:
    """What replays of micro-batches ask of the run. The engines' part is in the support table."""
    parallel, train = config.parallel, config.train
    if not train.cuda_graphs:
        return
    off, reason = "--train.cuda_graphs false", ""
    micro_batches = micro_batches_per_step(config, world_size)
    if train.device == "cpu":
        reason, fix = "needs a GPU, and train.device = cpu", off
    elif parallel.pp > 1:
        reason, fix = f"is for whole models, and parallel.pp = {parallel.pp}: messages to other stages are in no graph", off
    elif parallel.schedule not in ("1f1b", "auto"):
        reason = f"wants a backward pass after each forward pass, and parallel.schedule = {parallel.schedule}"
        fix = "--parallel.schedule 1f1b"
    elif parallel.offload_layers:
        reason = f"has no copies to the host in its graphs, and parallel.offload_layers = {parallel.offload_layers}"
        fix = f"--parallel.offload_layers 0, or {off}"
    elif parallel.tp > 1 and parallel.tp_overlap == "async":
        reason, fix = "was never tried with parallel.tp_overlap = async", f"--parallel.tp_overlap backward, or {off}"
    elif micro_batches < LEAST_GRAPHED:
        samples = LEAST_GRAPHED * train.micro_batch_size * data_parallel_size(config, world_size)
        reason = f"replays all micro-batches of a step but its first and last, and each data rank has {micro_batches}"
        fix = f"--train.global_batch_size to at least {samples}, or {off}"
    if reason:
        raise ConfigError(f"train.cuda_graphs = true {reason}; set {fix}")


RULES = (recompute_layers, rematerialization, float8)
