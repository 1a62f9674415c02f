"""The reference's loader, written again: Hugging Face `datasets` over parquet, a torch pipeline a cell, padded batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from loaders.law import Law
from torch.utils.data import DataLoader, Dataset

from scbench.data.extents import Cells
from scbench.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import datasets

# `datasets` hands a cell over as Python lists, its default; processes that make cells (0: none but this).
TRIED = tuple({"format": "python", "workers": workers} for workers in (0, 1, 2))
FORMAT = "parquet of lists (float32 ids, float32 log1p counts) and the Arrow cache that `datasets` makes of it"
WEIGHT_FLOOR = 1e-5
MASKED_VALUE = -1.0


class PaddedBatch(NamedTuple):
    """B cells, each `<cls>`, its genes, then pads: what the reference's training loop takes."""

    genes: torch.Tensor  # int64 [B, 1 + max_genes]
    values: torch.Tensor  # float32, the same shape; MASKED_VALUE where masked, 0 at <cls> and pads
    targets: torch.Tensor  # float32, the same shape
    padding: torch.Tensor  # bool, the same shape

    @property
    def n_cells(self) -> int:
        """B."""
        return len(self.genes)

    @property
    def n_tokens(self) -> int:
        """Tokens that are no pads."""
        return int((~self.padding).sum())


class ReferenceCells(Dataset):
    """One cell at a time: at most `max_genes` genes drawn, values masked."""

    def __init__(self, table: "datasets.Dataset", law: Law) -> None:
        self._table, self._law = table, law

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = self._table[index]
        genes, values = (torch.as_tensor(row[name], dtype=torch.float32) for name in ("genes", "expressions"))
        if len(genes) > self._law.max_genes:
            if torch.rand(()) < self._law.weighted_share:
                kept = torch.multinomial(values - values.min() + WEIGHT_FLOOR, self._law.max_genes)
            else:
                kept = torch.randperm(len(genes))[: self._law.max_genes]
            genes, values = genes[kept], values[kept]
        masked = torch.rand(len(genes)) < self._law.mask_ratio
        return genes.long(), values.masked_fill(masked, MASKED_VALUE), values


class Collate:
    """Pads cells to 1 + max_genes tokens."""

    def __init__(self, vocabulary: Vocabulary, law: Law) -> None:
        self._pad, self._cls, self._length = vocabulary.pad, vocabulary.cls, law.max_genes

    def __call__(self, cells: list[tuple[torch.Tensor, ...]]) -> PaddedBatch:
        genes, values, targets = (
            torch.stack([torch.nn.functional.pad(x, (1, self._length - len(x)), value=value) for x in column])
            for column, value in zip(zip(*cells, strict=True), (self._pad, 0.0, 0.0), strict=True)
        )
        genes[:, 0] = self._cls
        return PaddedBatch(genes, values, targets, genes == self._pad)


def build(corpus: Path, folder: Path) -> None:
    """The parquet file, and the Arrow cache."""
    import anndata
    import datasets  # noqa: F401, before the work: without it this loader is absent
    import pyarrow as pa
    import pyarrow.parquet as pq

    matrix = anndata.read_h5ad(corpus / "cells.h5ad").X
    schema = pa.schema([("genes", pa.list_(pa.float32())), ("expressions", pa.list_(pa.float32()))])
    with pq.ParquetWriter(folder / "cells.parquet", schema) as writer:
        for start in range(0, matrix.shape[0], 10_000):
            part = matrix[start : start + 10_000]
            offsets = pa.array(part.indptr, pa.int32())
            lists = [pa.ListArray.from_arrays(offsets, pa.array(x.astype(np.float32)))
                     for x in (part.indices, np.log1p(part.data, dtype=np.float64))]
            writer.write_table(pa.table(lists, schema=schema))
    _table(folder)


def _table(folder: Path) -> "datasets.Dataset":
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=str(folder / "cells.parquet"), cache_dir=str(folder / "arrow"),
                                 split="train")


def training(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[PaddedBatch]:
    """Epoch after epoch."""
    torch.manual_seed(law.seed)
    table = _table(folder).with_format(None if settings["format"] == "python" else settings["format"])
    collate = Collate(Vocabulary.load(corpus / "vocabulary.json"), law)
    loader = DataLoader(ReferenceCells(table, law), batch_size=law.batch_cells, shuffle=True, collate_fn=collate,
                        num_workers=settings["workers"], persistent_workers=settings["workers"] > 0)
    while True:
        yield from loader


def whole_cells(batch: PaddedBatch) -> Cells:
    """The cells of a batch that shows all genes."""
    shown = ~batch.padding
    shown[:, 0] = False
    counts = np.rint(np.expm1(batch.targets[shown].double().numpy())).astype(np.int64)
    visible = batch.values[shown].numpy() != MASKED_VALUE
    if not np.array_equal(batch.values[shown].numpy()[visible], batch.targets[shown].numpy()[visible]):
        raise ValueError("a value that is not masked differs from its target")
    lengths = shown.sum(1).numpy()
    return Cells(batch.genes[shown].numpy(), counts, np.concatenate([[0], np.cumsum(lengths)]))
