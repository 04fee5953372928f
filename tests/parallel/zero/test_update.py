"""The update of a shard: AdamW in every form in which its numbers can be kept, masked, clipped and unscaled."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from parallel.groups import Axis
from parallel.kernels import optimizer_kernels
from parallel.zero.buckets import Bucket, Sharding, make_buckets
from parallel.zero.engine import OptimizerSettings
from parallel.zero.storage import SLICES
from parallel.zero.update import ShardedUpdate
from tests.parallel.building import randn
from tests.parallel.largest_tensor import LargestTensor
from tests.parallel.zero.model import SHARDS, Net

ADAMW = OptimizerSettings(clip_norm=0.0)
REMAINDER = replace(ADAMW, master_weights="remainder")
BF16_MOMENTS = replace(ADAMW, moment_dtype=torch.bfloat16)
SMALLEST = replace(REMAINDER, moment_dtype=torch.bfloat16)
SGD = replace(ADAMW, algorithm="sgd")
ONE, ZERO, NOTHING = torch.ones(()), torch.zeros(()), nullcontext()
LEARNING_RATE = 1e-3


class Trained:
    """The update over a net's buckets, fed with gradients that are a function of the step."""

    def __init__(self, settings, dtype=torch.bfloat16):
        self.net = Net(dtype)
        sharding = Sharding(Axis.single("shard"), Axis.single("copies"))
        self.buckets = make_buckets(list(self.net.parameters()), 100, sharding, Bucket.start_reduction)
        self.update = ShardedUpdate(self.buckets, settings)

    def step(self, number, norm=ONE, skipped=ZERO, factor=1.0, inside=NOTHING):
        for i, bucket in enumerate(self.buckets):
            bucket.master_grad.copy_(randn(bucket.size, seed=1000 * number + i) * factor)
        with inside:
            self.update.apply(LEARNING_RATE, norm, skipped)

    def numbers(self):
        kinds = ("master", *self.update.moment_names)
        return {kind: torch.cat(list(self.update.read(kind))).clone() for kind in kinds}

    @property
    def weights(self):
        return torch.cat([bucket.weights for bucket in self.buckets]).clone()


def after(settings, steps, dtype=torch.bfloat16, **how):
    trained = Trained(settings, dtype)
    for number in range(steps):
        trained.step(number, **how)
    return trained


def test_whole_fp32_state_is_torchs_adamw():
    trained = Trained(ADAMW, torch.float32)
    named = Net(torch.float32).named()
    groups = [
        {"params": [p for name, p in named.items() if SHARDS[name].decay == decay], "weight_decay": decay * ADAMW.weight_decay}
        for decay in (True, False)
    ]
    right = torch.optim.AdamW(groups, LEARNING_RATE, (ADAMW.beta1, ADAMW.beta2), ADAMW.eps)
    for number in range(5):
        trained.step(number)
        for bucket in trained.buckets:
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True):
                gradient = bucket.master_grad[offset : offset + parameter.numel()].view(parameter.shape)
                named[parameter.shard.segments[0].name].grad = gradient.clone()
        right.step()
    for name, parameter in trained.net.named().items():
        torch.testing.assert_close(parameter.detach(), named[name].detach(), rtol=1e-6, atol=1e-7)
    assert trained.update.steps == 5


def test_masters_as_remainders_give_the_same_training_bit_for_bit():
    """But for ties that are rounded down, 1 in 2^17 updates, which move a master by its last bit."""
    expected, found = Trained(ADAMW), Trained(REMAINDER)
    for number in range(100):
        expected.step(number)
        found.step(number)
        assert torch.equal(found.weights, expected.weights)
    masters = [trained.numbers()["master"].view(torch.int32) for trained in (expected, found)]
    off = (masters[0] - masters[1]).abs()
    assert off.max() <= 1 and off.count_nonzero() <= 2
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found.numbers()[moment], expected.numbers()[moment])
    assert (found.numbers()["master"] != found.weights.float()).float().mean() > 0.5, "masters must lie between bf16 numbers"


def test_bf16_moments_stay_close_to_fp32_ones():
    expected, found = after(ADAMW, 50), after(BF16_MOMENTS, 50)
    for kind, right in expected.numbers().items():
        difference = (found.numbers()[kind] - right).norm() / right.norm()
        assert 0 < difference < 0.02, kind


@pytest.mark.parametrize("settings", [SMALLEST, REMAINDER, BF16_MOMENTS, replace(SGD, master_weights="remainder")])
def test_slices_change_nothing_and_no_more_than_one_is_in_fp32_at_a_time(settings, monkeypatch):
    whole = after(settings, 3)
    monkeypatch.setitem(SLICES, "cpu", 24)
    sliced = Trained(settings)
    largest = LargestTensor()
    for number in range(3):
        sliced.step(number, inside=largest)
    assert torch.equal(sliced.weights, whole.weights)
    for kind, numbers in whole.numbers().items():
        assert torch.equal(sliced.numbers()[kind], numbers)
    assert largest.bytes == 24 * 4


@pytest.mark.parametrize("settings", [ADAMW, REMAINDER, BF16_MOMENTS, SMALLEST, SGD])
def test_a_masked_update_changes_no_bit_and_is_not_counted(settings):
    trained = after(settings, 2)
    numbers, weights = trained.numbers(), trained.weights
    trained.step(2, norm=torch.tensor(math.nan), skipped=ONE, factor=math.inf)
    assert torch.equal(trained.weights, weights) and trained.update.steps == 2
    assert all(torch.equal(now, numbers[kind]) for kind, now in trained.numbers().items())


@pytest.mark.parametrize("settings", [ADAMW, SMALLEST, SGD])
def test_gradients_are_clipped_and_unscaled(settings):
    """Powers of two, so that nothing but the exponents differs."""
    plain = after(settings, 3)
    clipped = after(replace(settings, clip_norm=0.5), 3, norm=torch.tensor(2.0), factor=4.0)
    scaled = Trained(replace(settings, loss_scale=8.0, loss_scale_window=1))
    for number in range(3):  # 8, 16, 32
        scaled.step(number, factor=8.0 * 2**number)
    for other in (clipped, scaled):
        assert torch.equal(other.weights, plain.weights)
        assert all(torch.equal(numbers, plain.numbers()[kind]) for kind, numbers in other.numbers().items())
    assert scaled.update.loss_scale.value.item() == 64.0


@pytest.mark.parametrize("settings", [ADAMW, REMAINDER, BF16_MOMENTS, SMALLEST, SGD])
def test_what_was_read_can_be_stored_into_any_form(settings):
    source = after(ADAMW, 3)
    target = Trained(settings)
    for kind in ("master", *target.update.moment_names):
        tensors = list(target.update.read(kind))
        for tensor, numbers in zip(tensors, source.update.read(kind), strict=True):
            tensor.copy_(numbers)
        target.update.store(kind, tensors)
    assert torch.equal(target.weights, source.weights)
    for kind, numbers in target.numbers().items():
        exact = kind == "master" or settings.moment_dtype == torch.float32
        tolerance = dict(rtol=0.0, atol=0.0) if exact else dict(rtol=2**-7, atol=0.0)
        torch.testing.assert_close(numbers, source.numbers()[kind], **tolerance)


@pytest.mark.parametrize("settings", [ADAMW, REMAINDER, SMALLEST])
def test_a_copy_of_its_tensors_takes_an_update_back(settings):
    trained = after(settings, 2)
    numbers, kept = trained.numbers(), [tensor.clone() for tensor in trained.update.tensors()]
    trained.step(2)
    for tensor, copy in zip(trained.update.tensors(), kept, strict=True):
        tensor.copy_(copy)
    assert all(torch.equal(now, numbers[kind]) for kind, now in trained.numbers().items())
    assert trained.update.steps == 2


@pytest.mark.parametrize(
    ("settings", "dtype", "bytes_per_element"),
    [
        (ADAMW, torch.float32, 8),
        (ADAMW, torch.bfloat16, 12),
        (ADAMW, torch.float16, 12),
        (BF16_MOMENTS, torch.bfloat16, 8),
        (REMAINDER, torch.bfloat16, 10),
        (SMALLEST, torch.bfloat16, 6),
        (SGD, torch.bfloat16, 4),
    ],
)
def test_bytes_beside_the_weights(settings, dtype, bytes_per_element):
    trained = Trained(settings, dtype)
    assert trained.update.state_bytes == bytes_per_element * sum(bucket.size for bucket in trained.buckets)


def adamw_arguments(found_inf):
    tensors = [[randn(n, seed=seed + n) for n in (40, 7)] for seed in range(3)]
    squares = [tensor.square() for tensor in tensors[2]]
    settings = dict(learning_rate=0.01, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.1)
    scalars = dict(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(found_inf))
    return [*tensors, squares, torch.tensor(4.0)], {**settings, **scalars}


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_the_fused_adamw_is_its_plain_twin(found_inf):
    results = []
    for kernel in (optimizer_kernels.adamw, optimizer_kernels.adamw_reference):
        arguments, settings = adamw_arguments(found_inf)
        kernel(*arguments, **settings)
        results.append([arguments[0], arguments[2], arguments[3]])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    before = adamw_arguments(found_inf)[0]
    assert torch.equal(results[0][0][0], before[0][0]) == bool(found_inf)


def test_the_norm_is_its_plain_twin():
    tensors = [randn(n, seed=n) for n in (5, 100_000)]
    right = optimizer_kernels.l2_norm_reference(tensors)
    assert optimizer_kernels.l2_norm(tensors).item() == pytest.approx(right.item(), rel=1e-6)
    assert right.item() == pytest.approx(torch.cat(tensors).double().norm().item(), rel=1e-12)
