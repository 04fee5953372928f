"""The same model in `transformers`: an independent reference for logits, losses and gradients."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llama.config import ModelConfig
from megatron_llama.interop.hugging_face import hugging_face_name


def build(model: ModelConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A LlamaForCausalLM in fp32 with our weights; every one of its parameters must be given."""
    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
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
        attn_implementation="eager",
    )
    module = LlamaForCausalLM(config).float()
    named = {hugging_face_name(name): tensor for name, tensor in weights.items()}
    missing, unexpected = module.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    return module
