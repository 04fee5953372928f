"""The learning rate of each update, a pure function of its index."""

import math

from megatron_llama.config.sections import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of update `step` (0-based) of a run of `total_steps` updates.

    Linear warm-up over `warmup_steps` updates, the last of which uses the peak; then a cosine that reaches
    `min_learning_rate_ratio` of the peak at the last update, and stays there for any after it. With n = step + 1:

        n <= warmup             peak * n / warmup
        warmup < n <= total     minimum + (peak - minimum) / 2 * (1 + cos(pi * (n - warmup) / (total - warmup)))
        n > total               minimum

    Source: LLaMA section 2.3 (cosine to 10 % of the peak, 2000 warm-up steps); Loshchilov and Hutter, "SGDR", equation 5.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    minimum = peak * optimizer.min_learning_rate_ratio
    update = step + 1
    if update <= warmup:
        return peak * update / warmup
    if update >= total_steps:
        return minimum
    progress = (update - warmup) / (total_steps - warmup)
    return minimum + (peak - minimum) / 2 * (1 + math.cos(math.pi * progress))
