"""Numbers on their way to the host."""

import pytest
import torch

from parallel.host_copy import HostCopy

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_makes_the_values_when_they_are_read():
    """Nothing waits before: here they are still under way when the copy is asked for."""
    values = torch.zeros(2, dtype=torch.float64)
    copy = HostCopy(lambda: [values * 2], values.device)
    values += torch.tensor([1.0, 2.5])
    assert copy.read() == copy.read() == [2.0, 5.0]


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_gpu_copies_them_behind_the_work_so_far_and_waits_for_no_more(own_stream):
    values = torch.zeros(2, device="cuda")
    torch.cuda._sleep(10_000_000)
    values += 3.0
    copy = HostCopy(lambda: [values + 1], values.device, torch.cuda.Stream() if own_stream else None)
    torch.cuda._sleep(1_000_000_000)
    later = torch.cuda.Event()
    later.record()
    assert copy.read() == [4.0, 4.0] and not later.query()
