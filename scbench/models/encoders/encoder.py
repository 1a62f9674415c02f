"""What every structure is: packed token states in, token states or cell embeddings out."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.models.dropout_keys import DropoutKeys, Site


class Encoder(nn.Module, ABC):
    """Base of the encoders.

    Attributes
    ----------
    pools
        False: `forward` returns token states [T, D]. True: one embedding a cell, float32 [B, D] (float64 for float64).
    places
        Where a layer drops something; one place without a number by default.
    """

    pools = False
    places: tuple[Site, ...] = ((),)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def dropout_sites(self) -> list[Site]:
        """All that `forward` asks `keys` for."""
        return [(layer, *place) for layer in range(self.config.layers) for place in self.places]

    @abstractmethod
    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D]; `batch.genes` holds vocabulary ids; `keys(layer, site)` gives a site's dropout keys or None."""

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> bool:
        """Fill a parameter (its name inside the encoder) in the structure's own way; False: the model's rule holds."""
        return False
