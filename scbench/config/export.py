"""Options of export."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from scbench.config.common import Common, Output


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Common):
    """Make a model directory of a checkpoint: one process, no launcher, no DeepSpeed."""

    checkpoint: Positional[Path]
    """A checkpoint (run/checkpoints/step-…), or a run directory: its newest whole checkpoint is taken."""
    output: Output
    """The model directory to make."""
    store: Path | None = None
    """The store that the run was trained on, for the leakage guard; by default where it was then."""
