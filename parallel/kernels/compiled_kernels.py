"""The plain-torch references, made one kernel each by torch.compile: few passes over memory, and seconds of compilation."""

from __future__ import annotations

import torch

from parallel.kernels import reference_kernels

rms_norm = torch.compile(reference_kernels.rms_norm, dynamic=False)
add_rms_norm = torch.compile(reference_kernels.add_rms_norm, dynamic=False)
rope = torch.compile(reference_kernels.rope, dynamic=False)
swiglu = torch.compile(reference_kernels.swiglu, dynamic=False)
