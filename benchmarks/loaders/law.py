"""What is asked of every loader: how a training-ready batch is drawn. The defaults of `scbench pretrain`."""

from typing import NamedTuple


class Law(NamedTuple):
    """A batch: `batch_cells` cells, `max_genes` genes of each, half of the long cells drawn by weight, masked at random."""

    seed: int = 0
    batch_cells: int = 128
    max_genes: int = 512
    mask_ratio: float = 0.4
    weighted_share: float = 0.5
