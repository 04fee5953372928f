"""transformers' LlamaForCausalLM as a contestant: alone (also compiled, and with Liger's kernels), or with DeepSpeed ZeRO-1."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from _contestants import COMPUTE, CPU, OPTIMIZER, UPDATE, Setting, logical_weights
from _teams import Clock
from torch import Tensor, nn

from megatron_llama.config import ModelConfig

NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
         "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}  # fmt: skip


def build_llama(model: ModelConfig, weights: dict[str, Tensor], device: torch.device = CPU) -> nn.Module:
    """LlamaForCausalLM in fp32 with sdpa attention and our weights, given by their logical names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_context,
        }
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    with device:
        module = LlamaForCausalLM(config).float()
    missing, unexpected = module.load_state_dict({_peer_name(name): w for name, w in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set()), (missing, unexpected)
    return module.train()


def _peer_name(name: str) -> str:
    """`layers.3.attention.wq` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer, _, rest = name.removeprefix("layers.").partition(".")
    return f"model.layers.{layer}.{NAMES[rest]}.weight" if rest else f"{NAMES[name]}.weight"


def fused_adamw(module: nn.Module) -> torch.optim.AdamW:
    """torch's fused AdamW with the settings of ours: norms are not decayed."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, OPTIMIZER.learning_rate, (OPTIMIZER.beta1, OPTIMIZER.beta2), OPTIMIZER.eps, fused=True)


class Transformers:
    """One process: loss = sum / targets of the step, backward after each micro-batch, clip_grad_norm_, AdamW(fused=True).

    Parameters and gradients are always fp32; in bf16 it runs under torch.autocast. `is_compiled`: by torch.compile.
    `has_liger`: with all that Liger has for LLaMA, the fused head and loss included.
    """

    def __init__(
        self, setting: Setting, rank: int, clock: Clock, is_compiled: bool = False, has_liger: bool = False
    ) -> None:
        if has_liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        self.setting, self.clock, self.is_first = setting, clock, True
        self.device = torch.device(setting.device)
        self.module = build_llama(setting.model, logical_weights(setting), self.device)
        self.optimizer = fused_adamw(self.module)
        if is_compiled:
            self.module.compile()

    def run(self, number: int) -> tuple[float, float]:
        bf16, losses = self.setting.train.dtype == "bf16", []
        with self.clock.part(COMPUTE):
            for x, y in inputs_and_labels(self.setting.tokens(number, 0).to(self.device)):
                with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                    loss = self.module(
                        input_ids=x, labels=y, shift_labels=y, num_items_in_batch=self.setting.targets, use_cache=False
                    ).loss
                loss.backward()
                losses.append(loss.detach())
        exact = _exact_norm([p.grad for p in self.module.parameters()]) if self.is_first else None
        with self.clock.part(UPDATE):
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), OPTIMIZER.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.is_first = False
        return torch.stack(losses).sum().item(), norm.item() if exact is None else exact


class DeepSpeed:
    """Data-parallel ranks under ZeRO-1, as DeepSpeed's own guide has it: `engine.backward` and `engine.step` after each
    micro-batch, which its gradient accumulation counts; the loss is the micro-batch's mean."""

    def __init__(self, setting: Setting, rank: int, clock: Clock) -> None:
        self.setting, self.rank, self.clock, self.is_first = setting, rank, clock, True
        facts = {"WORLD_SIZE": setting.world_size, "RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"}
        os.environ |= {name: str(fact) for name, fact in facts.items()}
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of compiling, for inference only
        deepspeed.utils.logger.setLevel(logging.ERROR)
        module = build_llama(setting.model, logical_weights(setting))
        config = {
            "train_micro_batch_size_per_gpu": setting.train.micro_batch_size,
            "gradient_accumulation_steps": setting.micro_batches,
            "gradient_clipping": OPTIMIZER.clip_norm,
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=fused_adamw(module), config=config)

    def run(self, number: int) -> tuple[float, float]:
        losses, exact = [], None
        for x, y in inputs_and_labels(self.setting.tokens(number, self.rank)):
            with self.clock.part(COMPUTE):
                loss = self.engine(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss
                self.engine.backward(loss)
            losses.append(loss.detach())
            if self.is_first and len(losses) == self.setting.micro_batches:
                exact = self._exact_norm()
            with self.clock.part(UPDATE):
                self.engine.step()
        total = torch.stack(losses).mean()
        dist.all_reduce(total)
        self.is_first = False
        return total.item() / self.setting.world_size, float(self.engine.get_global_grad_norm()) if exact is None else exact

    def _exact_norm(self) -> float:
        from deepspeed.utils import safe_get_full_grad

        return _exact_norm([safe_get_full_grad(p) for p in self.engine.module.parameters()])


def inputs_and_labels(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:  # [micro-batches, b, s + 1] -> [b, s] twice
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


def _exact_norm(gradients: list[Tensor]) -> float:
    """For the comparison: on CPUs torch's own norm is too small by 1e-5 and more for large parameters."""
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
