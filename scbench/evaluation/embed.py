"""Cell embeddings of a pretrained model, and the verb `scbench embed`.

A cell's embedding is a function of its content, the model and the seed: not of the file, the row, the chunk or the batch
that it is in (up to rounding, 1e-5). A cell with more genes than the model takes at once is drawn `draws` times,
uniformly, and its embeddings are averaged; the draws are keyed by the hash of the cell's content.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import torch

from scbench import __version__
from scbench.config import EmbedConfig, InputLaw, Values
from scbench.data.cells import CellTokens, Counts, content_hash, take, to_tokens, wide
from scbench.data.gene_identity import GeneMap, check_matched, map_genes
from scbench.data.sampler import CellSampler
from scbench.data.sources.anndata import AnnDataSource, called
from scbench.data.sources.logarithms import LogarithmSource
from scbench.data.sources.reference_pt import ReferencePtSource
from scbench.errors import UserError
from scbench.evaluation import embedding_files
from scbench.evaluation.progress import progress_bar
from scbench.files import refuse_existing
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models.model import ExpressionModel
from scbench.training.allocator import keep_freed_memory

CHUNK_CELLS = 2048  # cells read at once: a few hundred MB at most
DRAWS = 4
SUBSETS = (f"of a cell with more genes than a model takes at once the embeddings of {DRAWS} subsets, fixed by the seed, are "
           "averaged (one by the recipe aaai2025)")  # for tables
BATCH_CELLS = 64
PRECISIONS = ("fp32", "bf16")


class Embedding(NamedTuple):
    """Embeddings and where they come from."""

    values: np.ndarray  # float32 [cells, D]
    cell_ids: np.ndarray  # str [cells]
    provenance: dict  # JSON-able

    def note(self, source: str) -> str | None:
        """What the user should know: how many cells are empty to the model."""
        empty = self.provenance["cells_without_known_genes"]
        if not empty:
            return None
        return f"{source}: {empty} of {len(self.values)} cells express no gene that the model knows; all get one embedding."


def embed(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    *,
    max_genes: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    batch_cells: int = BATCH_CELLS,
    precision: str = "fp32",
    layer: str | None = None,
    genes_column: str | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Embeddings of all cells, float32 [cells, D], in the order of the source.

    Parameters
    ----------
    model
        A pretrained model; its device is used, its training mode is left as it is.
    source
        Raw counts: an AnnData (in memory, backed, a view), an h5ad file, a zarr store, a 10x Genomics HDF5 file, or an open
        AnnDataSource.
    max_genes
        Longer cells are sampled; by default what the model was trained with.
    draws
        Gene subsets averaged for such a cell; by default 4, drawn uniformly (recipe aaai2025: 1, drawn by weight if the model
        was trained with weighted sampling, as the reference does).
    seed
        Of the draws.
    batch_cells
        Cells at once.
    precision
        "fp32", or "bf16": weights and states rounded to it, sums in fp32. Faster where the processor has instructions for
        it; the rounding is small beside what another draw of a cell's genes changes.
    layer
        Where the raw counts are: "X", "raw" or the name of a layer; found by default.
    genes_column
        Column of var that names the genes; found by default.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the source can't be read, holds no raw counts, or its genes are not the model's.
    """
    with opened(source, layer=layer, genes_column=genes_column) as source:
        options = {"max_genes": max_genes, "draws": draws, "seed": seed, "batch_cells": batch_cells}
        embedding = embed_source(model, source, precision=precision, progress=progress, **options)
        if note := embedding.note(source.name):
            warnings.warn(note, stacklevel=2)
        return embedding.values


def embed_source(
    model: ExpressionModel,
    source: AnnDataSource,
    *,
    max_genes: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    batch_cells: int = BATCH_CELLS,
    precision: str = "fp32",
    progress: bool = False,
) -> Embedding:
    """As `embed`, with cell ids and provenance."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}: it must be fp32 or bf16.")
    gene_map = map_genes(source.identity, model.vocabulary, source.name)
    with progress_bar("checking the counts", source.n_cells, progress) as advance:
        matching = match_counts(source, gene_map, advance)  # a pass of its own: errors come before hours of embedding
    values = np.zeros((source.n_cells, model.config.width), dtype=np.float32)
    empty = 0
    options = {"max_genes": max_genes, "draws": draws, "seed": seed, "batch_cells": batch_cells}
    weights = fingerprint(model)
    with progress_bar("embedding", source.n_cells, progress) as advance, in_precision(model, precision):
        for start, counts in chunks(source):
            cells = to_tokens(counts, gene_map)
            hashes = content_hash(cells.genes, cells.counts, cells.offsets)
            values[start : start + len(hashes)] = encode(model, cells, hashes, advance=advance, **options)
            empty += int((np.diff(cells.offsets) == 0).sum())
    provenance = {
        "scbench_version": __version__,
        "model_fingerprint": weights,
        "model_config": dataclasses.asdict(model.config),
        "model_provenance": model.provenance,
        "seed": seed,
        "draws": _draws(model, draws),
        "max_genes": max_genes or model.config.max_genes,
        "precision": precision,
        "layer": source.layer,
        "recovered_counts": source.recovered,
        **matching,
        "cells_without_known_genes": empty,
    }
    return Embedding(values, np.asarray(source.obs_names), provenance)


def encode(
    model: ExpressionModel,
    cells: CellTokens,
    hashes: np.ndarray,
    *,
    max_genes: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    batch_cells: int = BATCH_CELLS,
    advance: Callable[[int], None] = lambda cells: None,
) -> np.ndarray:
    """Embeddings of cells that are on the model's vocabulary, float32 [cells, D].

    Parameters
    ----------
    cells, hashes
        The cells and their content hashes, uint64 [cells].
    max_genes, draws, seed, batch_cells
        As in `embed`.
    advance
        Called with the number of cells that are done since the last call.
    """
    inputs = model.config.inputs
    max_genes = inputs.max_genes if max_genes is None else max_genes
    draws = _draws(model, draws)
    for name, value in [("max_genes", max_genes), ("draws", draws), ("batch_cells", batch_cells)]:
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1.")
    if model.config.structure == "linear_mixer" and max_genes > inputs.max_genes:
        raise UserError(f"max_genes is {max_genes}: a linear_mixer has weights for {inputs.max_genes} genes only.")
    inputs = inputs.with_max_genes(max_genes)
    sampler = sampler_of(model, inputs, seed)
    lengths = np.diff(cells.offsets)
    repeats = np.where(lengths > max_genes, draws, 1)
    first = np.cumsum(repeats) - repeats
    rows = np.repeat(np.arange(len(lengths)), repeats)  # a sequence is one draw of one cell
    draw = np.arange(len(rows)) - first[rows]
    keys = random.bits(hashes[rows], draw)
    by_length = np.argsort(-np.minimum(lengths[rows], max_genes), kind="stable")
    sums = np.zeros((len(lengths), model.config.width))
    with evaluating(model):
        for start in range(0, len(rows), batch_cells):
            chosen = by_length[start : start + batch_cells]
            batch_rows = rows[chosen]
            drawn = sampler.draw(take(cells, batch_rows), keys[chosen])
            batch = sampler.pack(drawn, np.arange(len(chosen)), hashes[batch_rows].view(np.int64), batch_rows)
            np.add.at(sums, batch_rows, model.encode(batch.to(device_of(model))).float().cpu().numpy())
            advance(int((draw[chosen] == 0).sum()))
    values = (sums / repeats[:, None]).astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError("the model's embeddings are not finite numbers: its weights are damaged, train or copy it again.")
    return values


def sampler_of(model: ExpressionModel, inputs: InputLaw, seed: int) -> CellSampler:
    """What draws a cell's genes for the model outside pretraining; nothing is masked."""
    weighted = model.config.recipe == "aaai2025" and model.provenance.get("training", {}).get("weighted_sampling", True)
    return CellSampler(
        model.vocabulary, inputs, seed=random.key(seed, Stream.EMBEDDING), weighted_share=1.0 if weighted else 0.0
    )


def _draws(model: ExpressionModel, draws: int | None) -> int:
    """How often a long cell is drawn, if nobody says it."""
    if draws is not None:
        return draws
    return 1 if model.config.recipe == "aaai2025" else DRAWS


@contextlib.contextmanager
def evaluating(model: ExpressionModel) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def in_precision(model: ExpressionModel, precision: str) -> Iterator[None]:
    """"bf16": its weights in bf16 (batch norm's statistics stay); its own are put back. "fp32": as they are."""
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        if precision == "bf16":
            model.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data


@contextlib.contextmanager
def opened(
    source: AnnDataSource | anndata.AnnData | Path | str, *, layer: str | None = None, genes_column: str | None = None,
    values: Values = "counts",
) -> Iterator[AnnDataSource]:
    """An AnnDataSource of anything that `embed` takes; closed afterwards if it was opened here.

    `values`: what the file holds, if not counts. The layer is then X by default.

    - log1p_counts: log1p of whole counts; UserError where the expm1 of a value is not whole.
    - lognorm: log1p of counts times a factor a cell; the counts are recovered, UserError if that fails.
    - as_is: anything on a logarithmic scale, to be fed to a model as it is.
    """
    if isinstance(source, AnnDataSource | ReferencePtSource):
        yield source
        return
    source = source if isinstance(source, anndata.AnnData) else Path(source)
    if values in ("log1p_counts", "as_is"):
        with LogarithmSource(source, values, layer=layer, genes_column=genes_column) as opened_:
            yield opened_
        return
    recover = values == "lognorm"
    layer = "X" if recover and layer is None else layer
    with AnnDataSource(source, layer=layer, genes_column=genes_column, recover_counts=recover) as opened_:
        if recover and opened_.recovered is None:
            raise UserError(f"{opened_.name} holds whole numbers in {called(opened_.layer)}, no log-normalised values: "
                            "leave out --values, or give another --layer.")
        yield opened_


def chunks(source: AnnDataSource) -> Iterator[tuple[int, Counts]]:
    """The first row of each chunk of cells, and their counts."""
    for start in range(0, source.n_cells, CHUNK_CELLS):
        yield start, source.read(start, min(start + CHUNK_CELLS, source.n_cells))


def match_counts(source: AnnDataSource, gene_map: GeneMap, advance: Callable[[int], None]) -> dict:
    """Read all counts once: how many of the genes and of the counts the model knows, JSON-able.

    UserError if a value is no count, or if under half of the counts are of genes that the model knows.
    """
    matched = total = 0
    for _, counts in chunks(source):
        known = gene_map.tokens[counts.columns] >= 0
        matched += wide(counts.counts[known]).sum()
        total += wide(counts.counts).sum()
        advance(len(counts.offsets) - 1)
    check_matched(gene_map, matched, total)
    return {
        "genes": gene_map.n_genes,
        "matched_genes": gene_map.matched_genes,
        "matched_gene_share": gene_map.matched_genes / gene_map.n_genes,
        "matched_count_share": matched / max(total, 1),
        "merged_columns": gene_map.merged_columns,
    }


def device_of(model: ExpressionModel) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def load_model(directory: Path) -> ExpressionModel:
    """A model directory's model, on the GPU if there is one; on a CPU this process keeps the memory that it frees."""
    model = ExpressionModel.from_pretrained(directory)
    if torch.cuda.is_available():
        return model.to("cuda")
    keep_freed_memory()
    return model


def fingerprint(model: ExpressionModel) -> str:
    """SHA-256 of shape, vocabulary and fp32 weights, hexadecimal: equal for equal models, however they were stored."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    digest.update(model.vocabulary.fingerprint.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_embed(config: EmbedConfig) -> dict:
    """`scbench embed`: write the embeddings, and return where they are and where they come from."""
    refuse_existing(config.output)
    embedding_files.check_suffix(config.output, config.only_embedding)
    model = load_model(config.model)
    with opened(config.input, layer=config.layer, genes_column=config.genes_column) as source:
        if source.kind != "h5ad" and not config.only_embedding:
            raise UserError(f"only of an h5ad file a copy is written: for {source.name}, give --only-embedding.")
        embedding = embed_source(
            model, source, draws=config.draws, seed=config.seed, batch_cells=config.batch_cells, precision=config.precision,
            progress=not config.json,
        )
    if config.only_embedding:
        embedding_files.write_alone(config.output, embedding.cell_ids, embedding.values, embedding.provenance)
    else:
        embedding_files.write_copy(config.input, config.output, embedding.values, embedding.provenance)
    if note := embedding.note(config.input.name):
        print(f"warning: {note}", file=sys.stderr)
    cells, width = embedding.values.shape
    if not config.json:
        place = "alone" if config.only_embedding else f'in obsm["{embedding_files.KEY}"] of a copy of {config.input.name}'
        print(f"{cells:,} cells × {width} numbers {place}: {config.output}")
    return {"output": str(config.output), "cells": cells, "width": width, "provenance": embedding.provenance}
