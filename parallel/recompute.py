"""Activation recomputation: none | selective | full.

`selective` makes again, in the backward pass, what is cheap to compute and large to keep: the attention core and the SwiGLU
product. `full` keeps only each block's input. Source: Korthikanti et al. 2022, section 5; Chen et al. 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` whose intermediate activations are dropped and made again in the backward pass.

    Nothing random is recomputed (there is no dropout), so no generator state is kept.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
