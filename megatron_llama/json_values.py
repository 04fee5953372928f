"""Numbers that JSON does not have."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same value with None in the place of every float that is not finite, also inside of dictionaries."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
