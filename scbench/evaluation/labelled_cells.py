"""The cells of a benchmark: labelled, never seen in pretraining, each once, in classes of some size."""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from scbench.data.cells import CellTokens, Counts, content_hash, take, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.evaluation import embed, labels, leakage
from scbench.evaluation.progress import progress_bar
from scbench.models.model import ExpressionModel

UNSEEN, TRANSDUCTIVE, NOT_CHECKABLE = "unseen", "transductive", "not checkable"


class LabelledCells(NamedTuple):
    """What is classified."""

    tokens: CellTokens  # on the model's vocabulary
    counts: scipy.sparse.csr_matrix  # float32 [cells, genes of the file]
    hashes: np.ndarray  # uint64 [cells], content hashes of `tokens`
    classes: np.ndarray  # int64 [cells]
    class_names: list[str]
    dropped_classes: dict[str, int]  # too small, and their cells
    counted: dict[str, int]  # how many cells were used, and removed for which reason
    overlap: str  # UNSEEN, TRANSDUCTIVE or NOT_CHECKABLE
    matching: dict  # which genes and counts the model knows
    seen: dict[str, int]  # labelled cells that the model was trained or validated on, by the leakage guard's stage

    def class_sizes(self) -> dict[str, int]:
        """Cells in each class."""
        sizes = np.bincount(self.classes, minlength=len(self.class_names))
        return dict(zip(self.class_names, sizes.tolist(), strict=True))

    def sentences(self) -> list[str]:
        """Which cells took part, in plain words."""
        c = self.counted
        said = [
            f"{c['used']:,} of {c['total']:,} cells in {len(self.class_names)} classes; left out: {c['unlabelled']:,} without "
            f"a label, {c['overlapping']:,} that the model was trained or validated on, {c['duplicates']:,} exact duplicates, "
            f"{c['in_small_classes']:,} in classes under {labels.SMALLEST_CLASS} cells."
        ]
        if self.dropped_classes:
            names = ", ".join(f"{name} ({size})" for name, size in self.dropped_classes.items())
            said.append(f"Classes under {labels.SMALLEST_CLASS} cells, left out everywhere: {names}.")
        if sum(self.seen.values()):
            said.append(f"Known from training: {_by_stage(self.seen)}.")
        unasked = [stage for stage in (leakage.CORE, leakage.GENE_SET) if stage not in self.seen]
        if self.seen and unasked:
            said.append(f"The leakage guard's stages {', '.join(unasked)} cannot be asked about this file and model: copies "
                        "that only they know would not be found.")
        if self.overlap == TRANSDUCTIVE:
            said.append("Transductive: cells that the model may have been trained on were kept.")
        elif self.overlap == NOT_CHECKABLE:
            said.append("The model does not say which cells it was trained on: whether these are new to it cannot be checked.")
        return said


class ReadCells(NamedTuple):
    """The labelled cells of a file that a benchmark may use, copies of each other and small classes included."""

    tokens: CellTokens
    counts: scipy.sparse.csr_matrix
    hashes: np.ndarray
    words: np.ndarray  # object [cells], labels
    rows: np.ndarray  # int64 [cells], ascending, in the file
    counted: dict[str, int]  # all cells of the file, and removed ones
    overlap: str
    matching: dict
    seen: dict[str, int]


def read_cells(
    model: ExpressionModel, source: AnnDataSource, label: str, *, max_overlap: float, allow_overlap: bool, progress: bool
) -> LabelledCells:
    """Read the cells that a benchmark of `model` may use; UserError if too few remain, or if it has seen too many."""
    read = read_labelled(
        model, source, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
    )
    return _choose(read.tokens, read.counts, read.hashes, read.words, source.name, label, read.counted, read.overlap,
                   read.matching, read.seen)


def read_labelled(
    model: ExpressionModel, source: AnnDataSource, label: str, *, max_overlap: float, allow_overlap: bool, progress: bool
) -> ReadCells:
    """As `read_cells`, before copies and small classes are left out; UserError if it has seen too many."""
    words = labels.read_labels(source.obs, label, source.name)
    labelled = np.array([word is not None for word in words], dtype=bool)
    if not labelled.any():
        raise UserError(f"column {label!r} of {source.name} holds no label at all: choose another --label.")
    gene_map = map_genes(source.identity, model.vocabulary, source.name)
    parts, hashes, kept = [], [], []
    with progress_bar("checking the counts", source.n_cells, progress) as advance:
        matching = embed.match_counts(source, gene_map, advance)
    found = leakage.find_seen_cells(model, source, progress=progress)
    seen = found.counts(labelled)
    if not allow_overlap and sum(seen.values()) > max_overlap * labelled.sum():
        raise UserError(_too_many(source.name, seen, int(labelled.sum()), max_overlap))
    wanted = labelled if allow_overlap else labelled & ~found.seen
    with progress_bar("reading", source.n_cells, progress) as advance:
        for start, read in embed.chunks(source):
            cells = to_tokens(read, gene_map)
            rows = np.flatnonzero(wanted[start : start + len(cells.totals)])
            parts.append((take(cells, rows), _matrix(read, len(source.identity.ids))[rows]))
            hashes.append(content_hash(cells.genes, cells.counts, cells.offsets)[rows])
            kept.append(rows + start)
            advance(len(cells.totals))
    tokens, counts = _join([part for part, _ in parts]), scipy.sparse.vstack([part for _, part in parts], format="csr")
    counted = {
        "total": source.n_cells, "unlabelled": int((~labelled).sum()), "overlapping": int((labelled & ~wanted).sum())
    }
    overlap = TRANSDUCTIVE if allow_overlap else UNSEEN if found.checked else NOT_CHECKABLE
    rows = np.concatenate(kept)
    return ReadCells(tokens, counts, np.concatenate(hashes), words[rows], rows, counted, overlap, matching, seen)


def read_stored_cells(store: Store, split: str, label: str, most: int) -> LabelledCells:
    """The same of the first `most` cells of a split, for any model that was pretrained on another split of the store.

    Counts are of the store's vocabulary, one column a token. UserError if the store didn't keep the label, or if too few
    cells remain.
    """
    name = f"the {split} split of {store.path}"
    part = store.split(split).first(most)
    obs = part.cells()
    if label not in obs.columns:
        raise UserError(f"{store.path} keeps no column {label!r}: prepare it with --keep-obs {label}, or choose another.")
    words = labels.read_labels(obs, label, name)
    rows = np.flatnonzero([word is not None for word in words])
    if not len(rows):
        raise UserError(f"column {label!r} of {name} holds no label at all: choose another --label.")
    # the last extent may hold more cells than were asked for
    extents = [part.read_extent(number) for number in range(len(part.extent_sizes))]
    genes, counts = (np.concatenate([extent[field] for extent in extents]) for field in (0, 1))
    lengths = np.concatenate([np.diff(extent.offsets) for extent in extents])
    cells = CellTokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]), obs["total"].to_numpy())
    tokens = take(cells, rows)
    shape = (len(rows), store.vocabulary.size)
    matrix = scipy.sparse.csr_matrix((tokens.counts.astype(np.float32), tokens.genes, tokens.offsets), shape)
    found = {"total": part.n_cells, "unlabelled": part.n_cells - len(rows), "overlapping": 0}
    return _choose(tokens, matrix, obs["content_hash"].to_numpy()[rows], words[rows], name, label, found, UNSEEN, {}, {})


def _choose(
    tokens: CellTokens, counts: scipy.sparse.csr_matrix, hashes: np.ndarray, words: np.ndarray, source: str, label: str,
    found: dict[str, int], overlap: str, matching: dict, seen: dict[str, int],
) -> LabelledCells:
    """Each labelled cell once, in classes of some size; `words` are their labels, `found` says who is missing already."""
    once = np.sort(np.unique(hashes, return_index=True)[1])
    chosen = labels.choose_classes(words[once])
    counted = {
        **found, "used": len(chosen.codes), "duplicates": len(hashes) - len(once),
        "in_small_classes": sum(chosen.dropped.values()),
    }
    if len(chosen.names) < 2:
        raise UserError(_too_few(source, label, counted, chosen))
    rows = once[chosen.keep]
    return LabelledCells(
        tokens=take(tokens, rows), counts=counts[rows], hashes=hashes[rows], classes=chosen.codes,
        class_names=chosen.names, dropped_classes=chosen.dropped, counted=counted, overlap=overlap, matching=matching,
        seen=seen,
    )


def take_counts(source: AnnDataSource, rows: np.ndarray) -> scipy.sparse.csr_matrix:
    """The counts of some cells, float32 CSR [rows, genes of the file]. `rows`: ascending."""
    parts = []
    for start, read in embed.chunks(source):
        inside = rows[(rows >= start) & (rows < start + len(read.offsets) - 1)]
        parts.append(_matrix(read, len(source.identity.ids))[inside - start])
    return scipy.sparse.vstack(parts, format="csr")


def _matrix(counts: Counts, genes: int) -> scipy.sparse.csr_matrix:
    """Counts as float32 CSR [cells, genes], without stored zeros."""
    shape = (len(counts.offsets) - 1, genes)
    matrix = scipy.sparse.csr_matrix((counts.counts.astype(np.float32), counts.columns, counts.offsets), shape)
    matrix.eliminate_zeros()
    return matrix


def _join(parts: list[CellTokens]) -> CellTokens:
    """The cells of all parts."""
    genes, counts, totals = (np.concatenate([part[field] for part in parts]) for field in (0, 1, 3))
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return CellTokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]), totals)


def _by_stage(seen: dict[str, int]) -> str:
    return ", ".join(f"{cells:,} by {stage}" for stage, cells in seen.items() if cells)


def _too_many(source: str, seen: dict[str, int], labelled: int, most: float) -> str:
    """How many cells the model has seen, and what to do."""
    total = sum(seen.values())
    return (
        f"{source}: the model was trained or validated on {total:,} of the {labelled:,} labelled cells ({_by_stage(seen)}), "
        f"{total / labelled:.1%}, and {most:.1%} are allowed: give other cells, --max-overlap 1 to leave these out, or "
        "--allow-overlap to keep them."
    )


def _too_few(source: str, label: str, counted: dict[str, int], chosen: labels.Classes) -> str:
    """Why there is nothing to classify, and what to do."""
    remain = counted["used"] + counted["in_small_classes"]
    reason = (
        f"{source}: {remain:,} labelled cells are left, with {len(chosen.names)} classes of at least "
        f"{labels.SMALLEST_CLASS} cells in {label!r}, and two are needed"
    )
    if counted["overlapping"]:
        return (
            f"{reason}; {counted['overlapping']:,} were removed because the model was trained or validated on them: give "
            "other cells, or --allow-overlap to keep them."
        )
    return f"{reason}: choose another --label or give more cells."
