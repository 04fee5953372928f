"""Presets against the papers' numbers, and against transformers' models of the same shape."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llama.config import load_config, tokens_per_step, total_steps, validate_model
from megatron_llama.config.presets import preset_names
from megatron_llama.flops import parameter_count


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_model_that_can_be_built(name):
    config = load_config(["--model.preset", name])
    validate_model(config)
    assert config.model.preset == name


@pytest.mark.parametrize(
    "name, learning_rate, tokens, steps",
    [
        ("llama-7b", 3.0e-4, 1.0e12, 238_419),
        ("llama-13b", 3.0e-4, 1.0e12, 238_419),
        ("llama-33b", 1.5e-4, 1.4e12, 333_787),
        ("llama-65b", 1.5e-4, 1.4e12, 333_787),
    ],
)
def test_hyper_parameters_of_the_paper(name, learning_rate, tokens, steps):
    config = load_config(["--model.preset", name])
    assert config.optimizer.learning_rate == learning_rate
    assert config.optimizer.warmup_steps == 2000
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optimizer.clip_norm, config.optimizer.min_learning_rate_ratio) == (1.0, 0.1)
    assert (config.train.sequence_length, config.train.global_batch_size) == (2048, 2048)
    assert tokens_per_step(config) == 4 * 2**20
    assert config.train.tokens == tokens and total_steps(config) == steps


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-70b", "llama-3-8b", "llama-3.1-405b", "llama-3.2-1b", "llama-100m"])
def test_parameter_count_equals_that_of_transformers(name):
    model = load_config(["--model.preset", name]).model
    shape = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        tie_word_embeddings=model.tie_embeddings,
    )
    with torch.device("meta"):
        reference = LlamaForCausalLM(shape)
    assert parameter_count(model) == reference.num_parameters()


def test_llama_3_scaling_by_release():
    factors = {name: load_config(["--model.preset", name]).model.rope_scaling_factor for name in preset_names()}
    assert (factors["llama-3-8b"], factors["llama-3.1-8b"], factors["llama-3.2-1b"]) == (1.0, 8.0, 32.0)
