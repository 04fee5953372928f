"""megatron-core's GPTModel as a contestant of benchmark_step.py: tensor, sequence and pipeline parallel on CPU processes.

Its local spec, eager, with two parts replaced: attention by torch's scaled_dot_product_attention, as in ours, and RMSNorm by
torch's own, which the local spec refuses under sequence parallelism. Its 1F1B schedule and the DistributedDataParallel wrapper
that collects gradients in fp32 are its own; its optimizers want CUDA, so torch's fused AdamW updates.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _contestants import COMPUTE, CPU, OPTIMIZER, UPDATE, Setting, logical_weights
from _peers import fused_adamw, inputs_and_labels
from _teams import Clock
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

FACTORIES = ("arange", "empty", "ones", "tensor", "zeros")


class Megatron:
    """One rank of tp x pp; there is no data parallelism."""

    def __init__(self, setting: Setting, rank: int, clock: Clock) -> None:
        self.tp, self.pp = setting.config.parallel.tp, setting.config.parallel.pp
        assert setting.world_size == self.tp * self.pp and setting.train.dtype == "fp32"
        self.setting, self.clock, self.is_first = setting, clock, True
        self.layers = setting.runtime(rank).layers  # ours are balanced with the head: the same split for both
        _without_cuda()
        parallel_state.initialize_model_parallel(self.tp, self.pp, create_gloo_process_groups=False)
        self.config = self._config()
        model = self._model()
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(self.config, buffers, model)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = self.model.no_sync
        self.optimizer = fused_adamw(model)

    def _config(self) -> TransformerConfig:
        model, layers = self.setting.model, [len(stage) for stage in self.layers]
        return TransformerConfig(
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
            bias_activation_fusion=False,  # compiled fusions: both sides are eager
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            use_cpu_initialization=True,
            pipeline_dtype=torch.float32,
            deallocate_pipeline_outputs=True,
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.tp > 1 and self.setting.config.parallel.sequence_parallel,
            pipeline_model_parallel_size=self.pp,
            num_layers_in_first_pipeline_stage=layers[0] if self.pp > 1 else None,
            num_layers_in_last_pipeline_stage=layers[-1] if self.pp > 1 else None,
        )

    def _model(self) -> GPTModel:
        setting, stage = self.setting, parallel_state.get_pipeline_model_parallel_rank()
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        spec.submodules.self_attention.submodules.core_attention = Attention
        model = GPTModel(
            self.config,
            TransformerBlockSubmodules(layer_specs=[spec] * len(self.layers[stage]), layer_norm=Norm),
            vocab_size=setting.model.vocab_size,
            max_sequence_length=setting.train.sequence_length,
            pre_process=stage == 0,
            post_process=stage == self.pp - 1,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=setting.model.rope_theta,
        )
        model.model_type = ModelType.encoder_or_decoder
        _load(model, logical_weights(setting), setting, self.layers[stage].start)
        return model

    def run(self, number: int) -> tuple[float, float]:
        setting = self.setting
        with self.clock.part(COMPUTE):
            self.model.zero_grad_buffer()
            losses = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=iter(inputs_and_labels(setting.tokens(number, 0))),
                model=self.model,
                num_microbatches=setting.micro_batches,
                seq_length=setting.train.sequence_length,
                micro_batch_size=setting.train.micro_batch_size,
                forward_only=False,
            )
        with self.clock.part(UPDATE):
            loss, norm = self._update(torch.stack([entry["loss"] for entry in losses]) if losses else torch.zeros(1))
        return loss, norm

    def _update(self, losses: Tensor) -> tuple[float, float]:
        """Clip and update. Returns the loss and the norm of the whole."""
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.grad = parameter.main_grad
        mine = [p.grad for p in parameters if param_is_not_tensor_parallel_duplicate(p)]
        if self.is_first:  # torch's norm on CPUs is too small for the comparison
            squares = torch.stack([gradient.double().square().sum() for gradient in mine]).sum()
        else:
            squares = nn.utils.get_total_norm(mine).double().square()
        totals = torch.stack([losses.double().mean() / self.tp, squares])
        dist.all_reduce(totals)
        loss, norm = totals[0].item(), totals[1].sqrt().item()
        nn.utils.clip_grads_with_norm_(parameters, OPTIMIZER.clip_norm, torch.tensor(norm))
        self.optimizer.step()
        self.is_first = False
        return loss, norm


class Attention(nn.Module):
    """torch's causal attention in the place of megatron-core's: [s, b, n, d], [s, b, k, d] twice -> [s, b, n d]."""

    def __init__(self, **unused: object) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: object, **unused_too: object) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


def _forward(batches: object, model: nn.Module) -> tuple[Tensor, object]:
    """megatron-core's `forward_step_func`: a stage's output, and what makes the loss of the last one's."""
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[1])[None]
    return model(tokens, positions, None, labels=labels), partial(_mean)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}  # it is divided in place


@torch.no_grad()
def _load(model: GPTModel, weights: dict[str, Tensor], setting: Setting, first_layer: int) -> None:
    """Put this rank's part of our weights, whole and by logical name, into the model. `first_layer` is its stage's."""
    tp, tp_rank = setting.config.parallel.tp, parallel_state.get_tensor_model_parallel_rank()

    def rows(name: str) -> Tensor:
        return weights[name].chunk(tp)[tp_rank]

    def columns(name: str) -> Tensor:
        return weights[name].chunk(tp, dim=1)[tp_rank]

    def of_layer(name: str) -> Tensor:
        """`N.self_attention.linear_qkv.weight` and the like."""
        number, _, rest = name.partition(".")
        ours = f"layers.{int(number) + first_layer}"
        if rest == "self_attention.linear_qkv.weight":  # per kv head: its query heads, its key, its value
            d = setting.model.head_dim
            q, k, v = (rows(f"{ours}.attention.{part}").unflatten(0, (-1, d)) for part in ("wq", "wk", "wv"))
            return torch.cat([q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]], dim=1).flatten(0, 2)
        if rest == "mlp.linear_fc1.weight":
            return torch.cat([rows(f"{ours}.feed_forward.w1"), rows(f"{ours}.feed_forward.w3")])
        if rest in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            return columns(f"{ours}.{'attention.wo' if 'proj' in rest else 'feed_forward.w2'}")
        return weights[f"{ours}.{'attention_norm' if 'input' in rest else 'ffn_norm'}"]

    whole = {
        "embedding.word_embeddings.weight": lambda: rows("tok_embeddings"),
        "output_layer.weight": lambda: rows("output"),
        "decoder.final_layernorm.weight": lambda: weights["norm"],
    }
    for name, parameter in model.named_parameters():
        value = whole[name]() if name in whole else of_layer(name.removeprefix("decoder.layers."))
        assert parameter.shape == value.shape, name
        parameter.copy_(value)


def _without_cuda() -> None:
    """megatron-core names CUDA in many places: here that means the CPU. Wrapped are functions that make tensors, and no others,
    so that its steps are not slowed down. Nothing is drawn at random in them."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *device: None
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    megatron_random._CUDA_RNG_STATE_TRACKER = NoRandomness()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _on_cpu(factory):
    def make(*arguments, **options):
        if options.get("device") == "cuda":
            options["device"] = CPU
        return factory(*arguments, **options)

    return make


class NoRandomness:
    """In the place of megatron-core's tracker of CUDA's random states: without dropout nobody draws."""

    def fork(self, *name: str) -> nullcontext:
        return nullcontext()
