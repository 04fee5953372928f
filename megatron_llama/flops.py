"""Parameters, floating-point operations and device peaks: what MFU is made of.

With h hidden, q = heads x head dim, k = kv heads x head dim, f ffn, v vocabulary, L layers, d the length of a document
(where attention does not stay inside documents, each sample is one: d = s):

    parameters of a layer   P = h (q + 2 k) + q h + 3 h f + 2 h         (attention, SwiGLU, two norms)
    parameters              L P + v h (1 if tied else 2) + h
    FLOPs of N tokens       N (6 L (P - 2 h) + 6 h v)  +  attention     (forward 2, backward 4 per weight)
      attention             12 L q sum(d^2) with all scores counted ("full"),
                             6 L q sum(d^2) with the causal half alone ("causal"), a query seeing d / 2 keys on average

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section
5.1, with SwiGLU and grouped heads, and without recomputed work: model FLOPs, as in Chowdhery et al., "PaLM", appendix B.
The embedding look-up and element-wise work count nothing.
"""

import re
from typing import Literal

from megatron_llama.config.sections import ModelConfig

TERA = 1e12

# Dense bf16 FLOP/s without sparsity, from the makers' data sheets, by the words of the name that torch gives a device.
# The first row whose words all occur decides, so variants stand above the plain name.
DENSE_BF16_PEAKS = (
    (("GB200",), 2450 * TERA),
    (("B200",), 2250 * TERA),
    (("GH200",), 989.4 * TERA),
    (("H200", "NVL"), 835.5 * TERA),
    (("H200",), 989.4 * TERA),
    (("H100", "PCIE"), 756 * TERA),
    (("H100", "NVL"), 835.5 * TERA),
    (("H100",), 989.4 * TERA),
    (("H800", "PCIE"), 756 * TERA),
    (("H800",), 989.4 * TERA),
    (("H20",), 148 * TERA),
    (("A100",), 312 * TERA),
    (("A800",), 312 * TERA),
    (("A40",), 149.7 * TERA),
    (("A30",), 165 * TERA),
    (("A10",), 125 * TERA),
    (("L40S",), 362.05 * TERA),
    (("L4",), 121 * TERA),
    (("MI300X",), 1307.4 * TERA),
    (("MI325X",), 1307.4 * TERA),
)


def layer_parameter_count(model: ModelConfig) -> int:
    """Parameters of one transformer block, its two norms included."""
    head_dim = model.hidden_size // model.num_heads
    query, key_value = model.num_heads * head_dim, model.num_kv_heads * head_dim
    attention = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model, the vocabulary unpadded; a tied head counts once."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer_parameter_count(model) + vocabulary + model.hidden_size


def model_flops(
    model: ModelConfig, tokens: int, squared_lengths: int, attention: Literal["causal", "full"] = "causal"
) -> int:
    """Model FLOPs of forward and backward over `tokens` tokens (module docstring).

    `squared_lengths` is the sum over their documents of length^2.
    """
    query = model.num_heads * (model.hidden_size // model.num_heads)
    matrices = model.num_layers * (layer_parameter_count(model) - 2 * model.hidden_size)
    scores = {"causal": 6, "full": 12}[attention] * model.num_layers * query
    return tokens * 6 * (matrices + model.hidden_size * model.vocab_size) + scores * squared_lengths


def flops_per_token(model: ModelConfig, sequence_length: int, attention: Literal["causal", "full"] = "causal") -> int:
    """Model FLOPs of forward and backward for one token in a sequence of `sequence_length` tokens, one document."""
    return model_flops(model, sequence_length, sequence_length**2, attention) // sequence_length


def dense_peak_flops(device_name: str, dtype: str = "bf16") -> float | None:
    """Dense peak in FLOP/s of the device that torch calls `device_name`, or None where it is not known.

    Only that of bf16 is tabulated, which fp16 shares; a partition of a device (MIG) has no published peak of its own.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if dtype not in ("bf16", "fp16") or "MIG" in words:
        return None
    return next((peak for names, peak in DENSE_BF16_PEAKS if words.issuperset(names)), None)


def model_flops_utilization(
    tokens_per_second: float, token_flops: float, device_count: int, peak: float | None
) -> float | None:
    """MFU: achieved over peak FLOP/s of all devices, a share between 0 and 1; None where the peak is not known."""
    return tokens_per_second * token_flops / (device_count * peak) if peak else None
