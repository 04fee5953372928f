"""Small transformers + DeepSpeed runs on gloo ranks: the independent reference for DeepSpeed's checkpoints."""

from __future__ import annotations

import gc
import os
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llama.config import ModelConfig
from megatron_llama.interop.hugging_face import our_name
from megatron_llama.interop.stored_model import StoredModel
from parallel.zero.deepspeed_setup import import_deepspeed

# With three layers the flat tensors of ZeRO-1 and 2 are cut in the middle of a parameter.
MODEL = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=45, vocab_size=131, norm_eps=1e-6
)
CONTEXT = 64  # tokens
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}  # with stage 1 in bf16: another optimizer of DeepSpeed's
SMALL_GROUPS = {"zero_optimization": {"sub_group_size": 5000}}


@dataclass(frozen=True)
class Run:
    """A run, and how it differs from the smallest one."""

    stage: int = 1
    bf16: bool = False
    tied: bool = False
    schedule: str = "none"  # of the learning rate: "torch", "deepspeed"
    extra: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's further settings

    @property
    def architecture(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.ffn_hidden_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads,
            rms_norm_eps=MODEL.norm_eps,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=self.tied,
            architectures=["LlamaForCausalLM"],
        )

    def engine(self, seed: int = 0) -> Any:
        """DeepSpeed's engine over the model, with the two parameter groups that transformers' Trainer makes."""
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
        gc.freeze()  # DeepSpeed collects garbage at each report of memory: seconds for all that was imported before the fork
        torch.manual_seed(seed)
        model = LlamaForCausalLM(self.architecture)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 40},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if self.schedule == "deepspeed":
            config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}}
        for key, value in self.extra.items():
            config[key] = config.get(key, {}) | value
        falling = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step)
        with redirect_stdout(StringIO()):
            engine, *_ = import_deepspeed().initialize(
                model=model,
                optimizer=torch.optim.AdamW(groups, lr=1e-2),
                config=config,
                lr_scheduler=falling if self.schedule == "torch" else None,
            )
        return engine


def train(engine: Any, steps: int, rank: int) -> list[float]:
    """The losses of some steps on data that differ from step to step and from rank to rank."""
    losses = []
    for step in range(engine.global_steps, engine.global_steps + steps):
        tokens = torch.randint(MODEL.vocab_size, (1, 16), generator=torch.Generator().manual_seed(100 * step + rank))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine: Any) -> dict[str, Tensor]:
    """The engine's whole masters and moments under our names, as `fp32/NAME`; all ranks call it together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not engine.zero_optimization_partition_weights():
        # Its table of the moments is made at the first update of the first group, when the other's are not there.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        ours = our_name(name)
        found[f"fp32/{ours}"] = safe_get_full_fp32_param(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{ours}"] = safe_get_full_optimizer_state(parameter, kind)
    return {name: value.detach().clone() for name, value in found.items()}


def save(rank: int, world_size: int, run: Run, folder: Path, steps: int = 3) -> tuple[dict[str, Tensor], list[float]]:
    """Train and save as Trainer does, config.json beside `global_stepN`. Returns the state saved, and losses after it."""
    engine = run.engine()
    train(engine, steps, rank)
    engine.save_checkpoint(str(folder))
    if rank == 0:
        run.architecture.save_pretrained(folder)
    return state(engine), train(engine, 2, rank)


def contents(stored: StoredModel) -> dict[str, Tensor]:
    """Everything in a model that was read, as `state` names it."""
    weights = {f"fp32/{name}": tensor.load() for name, tensor in stored.weights.items()}
    return weights | {name: tensor.load() for name, tensor in stored.optimizer.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
