"""Stand-ins for packages that need CUDA: the modules with their exact signatures and demands, computing in plain torch.

Signatures: Apex of July 2026 (csrc/layer_norm_cuda.cpp, csrc/megatron/, csrc/amp_C_frontend.cpp, contrib/csrc/xentropy),
Transformer Engine 2.20 (pytorch/csrc/extensions/pybind.cpp, cpp_extensions/gemm.py), FlashAttention 2.8.4 and its folders
hopper (3) and cute (4), of August 2026.
"""

from types import ModuleType

import torch
import torch.nn.functional as F


def module(name, **members):
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def check_contiguous(*tensors):
    assert all(x.is_contiguous() for x in tensors)


def norm(x, weight, eps):
    """y, and 1 / rms(x) in fp32, one for each row."""
    scale = (x.float().pow(2).mean(-1) + eps).rsqrt()
    return (x.float() * scale[..., None] * weight.float()).to(weight.dtype), scale.flatten()


def norm_backward(dy, x, weight, scale):
    normed = x.float() * scale.view(*x.shape[:-1], 1)
    dweight = (dy.float() * normed).flatten(0, -2).sum(0)
    g = dy.float() * weight.float()
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * scale.view(*x.shape[:-1], 1)
    return dx.to(x.dtype), dweight.to(weight.dtype)


# Apex


def rms_forward_affine_mixed_dtypes(input, normalized_shape, gamma, epsilon, /):
    check_contiguous(input, gamma)
    assert tuple(normalized_shape) == gamma.shape == input.shape[-1:]
    return norm(input, gamma, epsilon)


def rms_backward_affine(dout, invvar, input_or_output, normalized_shape, gamma, epsilon, memory_efficient, /):
    check_contiguous(dout, invvar, input_or_output, gamma)
    assert tuple(normalized_shape) == gamma.shape and memory_efficient is False and invvar.dtype == torch.float32
    return norm_backward(dout, input_or_output, gamma, invvar)


def check_rope(t, cos, sin, transpose_output):
    assert t.dim() == cos.dim() == sin.dim() == 4 and transpose_output is False
    assert t.shape[0] == cos.shape[0] and cos.shape == sin.shape and cos.shape[1:3] == (1, 1) and cos.shape[3] <= t.shape[3]
    assert cos.dtype == sin.dtype
    check_contiguous(cos, sin)  # the kernel knows their sizes only


def forward_cached(input, cos, sin, transpose_output, /):
    check_rope(input, cos, sin, transpose_output)
    first, second = input.float().chunk(2, -1)
    return (input.float() * cos + torch.cat([-second, first], -1) * sin).to(input.dtype)


def backward_cached(output_grads, cos, sin, transpose_output, /):
    check_rope(output_grads, cos, sin, transpose_output)
    first, second = (output_grads.float() * sin).chunk(2, -1)
    return (output_grads.float() * cos + torch.cat([second, -first], -1)).to(output_grads.dtype)


def wgrad_gemm_accum_fp32(input, d_output, d_weight, /):
    check_contiguous(input, d_output, d_weight)
    assert input.dtype == d_output.dtype and d_weight.dtype == torch.float32
    d_weight += d_output.float().t() @ input.float()


def xentropy_forward(input, labels, smoothing, half_to_float, /):
    assert input.dim() == 2 and labels.dim() == 1 and labels.dtype == torch.int64 and smoothing == 0.0
    assert not half_to_float or input.dtype == torch.float16
    check_contiguous(labels)
    log_sum = input.float().logsumexp(-1)
    losses = log_sum - input.float().gather(-1, labels[:, None])[:, 0]
    return losses, log_sum if half_to_float else log_sum.to(input.dtype)


def xentropy_backward(grad_loss, logits, max_log_sum_exp, labels, smoothing, /):
    check_contiguous(grad_loss, max_log_sum_exp, labels)
    assert smoothing == 0.0 and grad_loss.dtype in (logits.dtype, torch.float32)
    softmax = (logits.float() - max_log_sum_exp.float()[:, None]).exp()
    return ((softmax - F.one_hot(labels, logits.shape[1])) * grad_loss.float()[:, None]).to(logits.dtype)


def multi_tensor_adam_capturable(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale, /
):
    assert chunk_size == 65536 and noop_flag.dtype == step.dtype == torch.int32
    assert lr.dtype == inv_scale.dtype == torch.float32 and (mode, bias_correction) == (1, 1)
    assert all(x.numel() and x.is_contiguous() for tensors in tensor_lists for x in tensors)
    if noop_flag.item():
        return
    for g, p, m, v in zip(*tensor_lists, strict=True):
        g.mul_(inv_scale)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        direction = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon)
        p.sub_(lr * (direction + weight_decay * p))


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python, /):
    assert chunk_size == 65536 and noop_flag.dtype == torch.int32 and per_tensor_python is False
    return torch.cat(tensor_lists[0]).double().norm().float().view(1), torch.empty(0)


# Transformer Engine

TE_DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    assert input.dim() == 2 and ln_out is None and quantizer is None and otype == TE_DTYPES[input.dtype]
    assert sm_margin == 0 and zero_centered_gamma is False
    y, scale = norm(input, weight, eps)
    return [y, None, scale]


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    assert dz.dim() == x.dim() == 2 and rsigma.shape == x.shape[:1] and sm_margin == 0 and zero_centered_gamma is False
    return list(norm_backward(dz, x, gamma, rsigma))


def rmsnorm_bwd_add(dz, x, add, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    assert add.shape == x.shape
    dx, dgamma = rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
    return [dx + add, dgamma]


def swiglu(input, quantizer):
    assert quantizer is None
    a, b = input.float().chunk(2, -1)
    return (F.silu(a) * b).to(input.dtype)


def dswiglu(grad, fwd_input, quantizer):
    assert quantizer is None
    x = fwd_input.detach().float().requires_grad_()
    with torch.enable_grad():
        y = swiglu(x, None)
    return torch.autograd.grad(y, x, grad.float())[0].to(fwd_input.dtype)


def general_gemm(
    A,
    B,
    out_dtype=None,
    quantization_params=None,
    gelu=False,
    gelu_in=None,
    alpha=1.0,
    beta=None,
    accumulate=False,
    layout="TN",
    out=None,
    bias=None,
    use_split_accumulator=False,
    grad=False,
    ub=None,
    ub_type=None,
    extra_output=None,
    bulk_overlap=False,
):
    """Layout NT: B^T A, in row-major terms."""
    assert layout == "NT" and accumulate and out_dtype == out.dtype and out.is_contiguous() and A.dtype == B.dtype
    out += B.float().t() @ A.float()
    return out, None, None, None


# FlashAttention


def attend(q, k, v):  # [b, s, n, d], [b, s, k, d] twice
    assert q.dtype in (torch.bfloat16, torch.float16) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):  # [t, n, d], [t, k, d] twice
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) <= max_seqlen_q == max_seqlen_k and sum(lengths) == len(q)
    check_contiguous(q, k, v)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x[None] for x in part))[0] for part in parts])


def flash_2(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert causal
    return attend(q, k, v)


def flash_2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_3(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    assert causal
    return attend(q, k, v)


def flash_3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    assert causal
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_4(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
):
    assert causal and qv is None
    return attend(q, k, v), None


def flash_4_varlen(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
):
    assert causal and qv is None
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def packages():
    """Name -> module of every stand-in."""
    multi_tensor = {
        "multi_tensor_adam_capturable": multi_tensor_adam_capturable,
        "multi_tensor_l2norm": multi_tensor_l2norm,
    }
    cute = module("flash_attn.cute", flash_attn_func=flash_4, flash_attn_varlen_func=flash_4_varlen)
    made = [
        module(
            "fused_layer_norm_cuda",
            rms_forward_affine_mixed_dtypes=rms_forward_affine_mixed_dtypes,
            rms_backward_affine=rms_backward_affine,
        ),
        module("fused_rotary_positional_embedding", forward_cached=forward_cached, backward_cached=backward_cached),
        module("fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32),
        module("xentropy_cuda", forward=xentropy_forward, backward=xentropy_backward),
        module("amp_C", **multi_tensor),
        module("transformer_engine"),
        module("transformer_engine.pytorch"),
        module("transformer_engine.pytorch.constants", TE_DType=TE_DTYPES),
        module("transformer_engine.pytorch.cpp_extensions", general_gemm=general_gemm),
        module(
            "transformer_engine_torch",
            rmsnorm_fwd=rmsnorm_fwd,
            rmsnorm_bwd=rmsnorm_bwd,
            rmsnorm_bwd_add=rmsnorm_bwd_add,
            swiglu=swiglu,
            dswiglu=dswiglu,
            **multi_tensor,
        ),
        module("flash_attn", flash_attn_func=flash_2, flash_attn_varlen_func=flash_2_varlen, cute=cute),
        cute,
        module("flash_attn_interface", flash_attn_func=flash_3, flash_attn_varlen_func=flash_3_varlen),
    ]
    return {package.__name__: package for package in made}
