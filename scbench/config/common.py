"""Options that every verb understands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

Output = Annotated[Path, arg(aliases=["-o"])]
Values = Literal["counts", "log1p_counts", "lognorm", "as_is"]  # what a file of cells holds (embed.opened)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every verb understands."""

    seed: int = 0
    """Seed of every random choice."""
    json: bool = False
    """Print the result as JSON."""
    debug: bool = False
    """Show the traceback of an error."""
