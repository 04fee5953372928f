"""megatron-core's own GPTModel (its local spec) on CPU processes, as an independent reference for its formats.

Call these in processes made by run_ranks: they replace what names CUDA in megatron-core, for the life of the process.
"""

from __future__ import annotations

import signal
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.megatron_layout import padded_vocabulary


def build_core_model(model: ModelConfig, tp: int, pp: int = 1):
    """This rank's GPTModel of tp x pp ranks; its logits are whole. Its weights are not set."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    _without_cuda()
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocabulary(model.vocab_size, tp),
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        rope_scaling=model.rope_scaling_factor != 1.0,
        rope_scaling_factor=model.rope_scaling_factor,
    )


@torch.no_grad()
def draw_weights(core_model, seed: int = 1) -> None:
    """Random weights, the same on one rank wherever it is called."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in core_model.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + 1.0 if parameter.ndim == 1 else noise)


@torch.no_grad()
def core_logits(core_model, tokens: Tensor, vocab_size: int) -> Tensor:  # [b, s] -> [b, s, v]
    """Its logits, without those of the padding."""
    s = tokens.shape[1]
    positions, mask = torch.arange(s)[None].expand_as(tokens), torch.ones(s, s).triu(1).bool()[None, None]
    return core_model(tokens, positions, mask)[..., :vocab_size]


def core_args(model: ModelConfig, tp: int = 1) -> Namespace:
    """Arguments as Megatron-LM lays them into its checkpoints, with values of the classes that it has there."""
    from megatron.core.transformer.enums import AttnBackend

    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        group_query_attention=model.num_kv_heads != model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        padded_vocab_size=padded_vocabulary(model.vocab_size, tp),
        vocab_size=None,
        seq_length=64,
        norm_epsilon=model.norm_eps,
        rotary_base=int(model.rope_theta),
        use_rope_scaling=model.rope_scaling_factor != 1.0,
        rope_scaling_factor=model.rope_scaling_factor,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        tensor_model_parallel_size=tp,
        attention_backend=AttnBackend.auto,
        params_dtype=torch.float32,
        exit_signal=signal.SIGTERM,
        tokenizer_model=Path("/data/tokenizer.model"),
        further=SimpleNamespace(a=1),
    )


def _without_cuda() -> None:
    """Devices of CUDA become the CPU; no process is spawned when a checkpoint is saved; nothing is random."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.safe_globals import register_safe_globals
    from megatron.core.tensor_parallel import random as megatron_random

    register_safe_globals()  # as Megatron-LM does at its start
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *device: None
    Tensor.cuda = lambda tensor, *unused: tensor
    filesystem_async._results_queue = Queue()
    megatron_random._CUDA_RNG_STATE_TRACKER = SimpleNamespace(fork=lambda *name: nullcontext())
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
