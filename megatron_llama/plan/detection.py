"""The hardware profile of the GPU that a program runs on."""

from __future__ import annotations

import re

from megatron_llama.plan.hardware import GIB

LARGE_A100_BYTES = 60 * GIB  # between the 40 GB and the 80 GB of the two kinds

# Profiles by the words of the name that torch gives a device. The first row whose words all occur decides; None: a variant with
# other links or clocks, which no profile describes.
PROFILES = (
    (("MIG",), None),
    (("PCIE",), None),
    (("NVL",), None),
    (("GB300",), "gb300"),
    (("GB200",), "gb200"),
    (("B200",), "b200"),
    (("H200",), "h200"),
    (("H100",), "h100"),
    (("A100",), "a100-80gb"),
    (("MI300X",), "mi300x"),
)


def profile_of(device_name: str, memory_bytes: int) -> str | None:
    """The profile of the GPU that torch calls `device_name` and that has so much memory; None where there is none."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    profile = next((profile for names, profile in PROFILES if words.issuperset(names)), None)
    return "a100-40gb" if profile == "a100-80gb" and memory_bytes < LARGE_A100_BYTES else profile
