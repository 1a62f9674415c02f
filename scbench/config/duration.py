"""Lengths of time as people write them."""

import re

from scbench.errors import UserError

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def seconds(option: str, text: str) -> float:
    """`3h50m`, `90m`, `1d12h` or a bare number of seconds, in seconds; UserError that names `option` for anything else."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
    total = sum(float(part or 0) * unit for part, unit in zip(parts.groups(), _UNITS.values(), strict=True)) if parts else 0
    if total <= 0:
        raise UserError(f"{option} {text} is no length of time: write it as 3h50m, 90m or a number of seconds.")
    return total
