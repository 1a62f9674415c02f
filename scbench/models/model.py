"""ExpressionModel: embedding → encoder → heads, over packed cells."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.data.batch import CLS, PAD, CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.models import pretrained
from scbench.models.dropout_keys import dropout_keys, no_dropout
from scbench.models.embedding import GeneValueEmbedding
from scbench.models.encoders import ENCODERS
from scbench.models.heads import LibrarySizeOffset, MvcHead, RegressionHead
from scbench.models.initialization import initialize
from scbench.models.pooling import mean_states


class ExpressionOutput(NamedTuple):
    """What a model says of a batch. Losses are sums of squared errors over `batch.denominator`, so that the parts of a
    split step add up. A NamedTuple: ZeRO-3's hooks can't see into a dataclass."""

    loss: Tensor  # regression_loss + mvc_loss
    regression_loss: Tensor
    mvc_loss: Tensor
    regression: Tensor  # [M], predicted values of masked genes from their own tokens; without any, `mvc` again
    mvc: Tensor  # [M], and from the cell embedding
    cell_embedding: Tensor  # [B, D], float32


class ExpressionModel(nn.Module):
    """Predicts masked expression values; its cell embedding is what downstream tasks use.

    Parameters
    ----------
    config
        The model's shape.
    vocabulary
        Token → row of the gene table. UserError if its size differs from the configuration's.
    seed
        Of the weights and of dropout.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, seed: int = 0):
        super().__init__()
        if vocabulary.size != config.vocabulary_size:
            raise UserError(
                f"the vocabulary holds {vocabulary.size} tokens, the model {config.vocabulary_size}: "
                "use the vocabulary that the model was trained with."
            )
        self.config, self.vocabulary, self.seed = config, vocabulary, seed
        self.provenance: dict = {}
        self.training_cells: np.ndarray | None = None  # sorted content hashes
        self.training_fingerprints: Path | None = None  # what the leakage guard needs beside them
        self.embedding = GeneValueEmbedding(config, vocabulary.pad)
        self.encoder = ENCODERS[config.structure](config)
        self.regression_head = RegressionHead(config.width) if config.regression else None
        self.mvc_head = MvcHead(config.width) if config.mvc else None
        self.offset = LibrarySizeOffset(config.width) if config.library_size_offset else None
        initialize(self)

    def encode(self, batch: CellBatch) -> Tensor:
        """Cell embeddings, float32 [B, D], without the heads."""
        batch = self._resolved(batch)
        states, _ = self.embedding(batch)
        cell_index, positions = self._places(batch)
        return self._encode(states, batch, cell_index, positions)[1]

    def forward(self, batch: CellBatch) -> ExpressionOutput:
        """Losses and predictions of a batch with masked genes."""
        batch = self._resolved(batch)
        states, query_embeddings = self.embedding(batch)
        cell_index, positions = self._places(batch)
        states, cell_embedding = self._encode(states, batch, cell_index, positions)
        masked_cells = cell_index.index_select(0, batch.masked)
        offset = None if self.offset is None else self.offset(batch.library_sizes)
        denominator = batch.denominator.clamp(min=1)  # nothing masked: a zero loss with a graph
        nothing = cell_embedding.sum() * 0
        regression_loss, mvc_loss = nothing, nothing
        regression = mvc = torch.zeros_like(batch.targets)
        if self.mvc_head is not None:
            shifted = cell_embedding if offset is None else cell_embedding + offset
            mvc_sum, mvc = self.mvc_head(
                query_embeddings, batch.query_index, batch.query_order, shifted, masked_cells, batch.targets
            )
            mvc_loss = mvc_sum / denominator
        if self.regression_head is None:
            regression = mvc.detach()
        else:
            masked_states = states.index_select(0, batch.masked)
            if offset is not None:
                masked_states = masked_states + offset.to(states.dtype).index_select(0, masked_cells)
            regression_sum, regression = self.regression_head(masked_states, batch.targets)
            regression_loss = regression_sum / denominator
        return ExpressionOutput(regression_loss + mvc_loss, regression_loss, mvc_loss, regression, mvc, cell_embedding)

    def prompted(self, batch: CellBatch, prompts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of squared errors, which can be differentiated by the prompts; predictions [M]) at the masked genes when no
        value is fed: a token's state is its gene's table row, and `prompts` [B, D] are added to those of `<cls>`.

        The AAAI 2025 reference's way to predict perturbed cells. Predictions are the regression head's, or MVC's where there
        is none. No cell's total is told either.
        """
        batch = self._resolved(batch)
        table = self.embedding.gene_table()
        states = table.index_select(0, batch.genes)
        if prompts is not None:
            states = states.index_add(0, batch.cell_offsets[:-1], prompts.to(states.dtype))
        cell_index, positions = self._places(batch)
        states, cell_embedding = self._encode(states, batch, cell_index, positions)
        if self.regression_head is not None:
            return self.regression_head(states.index_select(0, batch.masked), batch.targets)
        queries, cells = table.index_select(0, batch.query_genes), cell_index.index_select(0, batch.masked)
        return self.mvc_head(queries, batch.query_index, batch.query_order, cell_embedding, cells, batch.targets)

    def _resolved(self, batch: CellBatch) -> CellBatch:
        """The batch with this vocabulary's ids in place of CLS and PAD, and sorted by them."""
        if batch.resolved:
            return batch
        genes = batch.genes
        genes = torch.where(genes == CLS, self.vocabulary.cls, torch.where(genes == PAD, self.vocabulary.pad, genes))
        return batch._replace(genes=genes, gene_order=torch.argsort(genes, stable=True).int(), resolved=True)

    def _encode(self, states: Tensor, batch: CellBatch, cell_index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(token states [T, D], or nothing of use where the structure pools by itself; cell embeddings, float32 [B, D])."""
        encoded = self.encoder(states, batch, self._keys(batch, cell_index, positions))
        return encoded, encoded if self.encoder.pools else self._pool(encoded, batch, cell_index)

    def _places(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """int64 [T] each: the cell of each token, and its place in the cell. No synchronisation: T is known."""
        lengths = batch.cell_offsets.diff()
        tokens = batch.genes.shape[0]
        cells = torch.arange(batch.n_cells, device=lengths.device)
        cell_index = torch.repeat_interleave(cells, lengths, output_size=tokens)
        return cell_index, torch.arange(tokens, device=lengths.device) - batch.cell_offsets[cell_index]

    def _keys(self, batch: CellBatch, cell_index: Tensor, positions: Tensor):
        if not self.training or self.config.dropout == 0:
            return no_dropout
        return dropout_keys(self.seed, self.encoder.dropout_sites(), batch.samples, cell_index, positions)

    def _pool(self, states: Tensor, batch: CellBatch, cell_index: Tensor) -> Tensor:
        """Cell embeddings, float32 [B, D]: the state of <cls>, or the mean over genes, <cls> and pads left out (aaai2025:
        the mean over all tokens, as the reference has it)."""
        if self.config.pooling == "cls":
            dtype = torch.promote_types(states.dtype, torch.float32)
            return states.index_select(0, batch.cell_offsets[:-1]).to(dtype)
        return mean_states(states, batch.cell_offsets, cell_index, without_first=self.config.recipe != "aaai2025")

    def gene_embeddings(self) -> pd.DataFrame:
        """The gene table, one row a token, indexed by token."""
        with torch.no_grad():
            return pd.DataFrame(self.embedding.gene_table().float().cpu().numpy(), index=self.vocabulary.names)

    def embed(self, source, **options) -> np.ndarray:
        """Embeddings of an AnnData's (or h5ad file's) cells, float32 [cells, D]; options as in `scbench.embed`."""
        from scbench.evaluation.embed import embed  # evaluation stands above models: imported only when used

        return embed(self, source, **options)

    def save_pretrained(
        self, directory: Path, provenance: dict, training_cells: np.ndarray | None = None,
        save_fingerprints: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a model directory (see scbench.models.pretrained)."""
        pretrained.save(self, Path(directory), provenance, training_cells, save_fingerprints)

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ExpressionModel":
        """Read a model directory, in fp32 and evaluation mode; DeepSpeed is not needed."""
        return pretrained.load(cls, Path(directory))
