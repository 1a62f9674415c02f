"""`prepare --part i/n`: which cells of the inputs one of n jobs takes, and in which pieces it reads them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from scbench.errors import UserError


class Part(NamedTuple):
    """One job of `of`."""

    number: int  # from 1
    of: int


class Range(NamedTuple):
    """Cells `start` … `stop`−1 of source number `source`."""

    source: int
    start: int
    stop: int


def parse_part(text: str) -> Part:
    """i/n as a Part; UserError if it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text!r} is not i/n, like 3/8 for the third of eight jobs.")
    return Part(int(match[1]), int(match[2]))


def cell_ranges(cells: Sequence[int], size: int, part: Part | None) -> tuple[Range, ...]:
    """The ranges of at most `size` cells that a worker reads at once: those of all inputs, or a part's contiguous share.

    `cells`: of each source. UserError if there are fewer ranges than parts.
    """
    ranges = [
        Range(source, start, min(start + size, total))
        for source, total in enumerate(cells) for start in range(0, total, size)
    ]
    if part is None:
        return tuple(ranges)
    if part.of > len(ranges):
        raise UserError(
            f"--part {part.number}/{part.of}: the inputs make {len(ranges)} pieces of up to {size:,} cells, so there can be "
            f"{len(ranges)} parts at most."
        )
    first, last = ((number * len(ranges)) // part.of for number in (part.number - 1, part.number))
    return tuple(ranges[first:last])
