"""The cells of a benchmark: labelled, each once, in classes of some size, and never seen in pretraining.

Which cells a file offers does not depend on any model: cells are told apart by their counts of all genes of the file, and
named by their ids. A model only takes away: the cells that it has seen.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse

from scbench.data.cells import CellTokens, Counts, content_hash, take, to_tokens
from scbench.data.gene_identity import GeneIdentity, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.store import Store
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed, labels
from scbench.evaluation.guard import UNSEEN, Guarded, guard, match
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.split_files import unique_ids, unit_hashes
from scbench.models.model import ExpressionModel


class ReadCells(NamedTuple):
    """The labelled cells of a file, each content once; small classes included."""

    source: str  # the file's name
    identity: GeneIdentity  # of the columns of `counts`
    counts: scipy.sparse.csr_matrix  # [cells, genes of the file], uint32, or floating where values are not whole; no zeros
    rows: np.ndarray  # int64 [cells], in the file
    ids: np.ndarray  # str objects [cells], distinct
    keys: np.ndarray  # uint64 [cells], hashes of `ids`
    content: np.ndarray  # uint64 [cells], hashes of the counts of all genes of the file
    words: np.ndarray  # str objects [cells], labels
    groups: np.ndarray | None  # str objects [cells]
    counted: dict[str, int]  # all cells of the file, and removed ones by reason

    def take(self, rows: np.ndarray) -> "ReadCells":
        """Some of the cells, by their places here."""
        columns = ("rows", "ids", "keys", "content", "words")
        groups = None if self.groups is None else self.groups[rows]
        return self._replace(counts=self.counts[rows], groups=groups, **{name: getattr(self, name)[rows] for name in columns})

    def tokens_on(self, vocabulary: Vocabulary) -> tuple[CellTokens, np.ndarray]:
        """The cells on a vocabulary, and the hashes of their content there, uint64 [cells]."""
        gene_map = map_genes(self.identity, vocabulary, self.source)
        parts = []
        for start in range(0, len(self.rows), embed.CHUNK_CELLS):
            part = self.counts[start : start + embed.CHUNK_CELLS]
            columns, offsets = (values.astype(np.int64) for values in (part.indices, part.indptr))
            parts.append(to_tokens(Counts(columns, part.data, offsets), gene_map))
        tokens = _join(parts)
        return tokens, content_hash(tokens.genes, tokens.counts, tokens.offsets)


@dataclass(frozen=True, kw_only=True)
class LabelledCells:
    """What is classified."""

    counts: scipy.sparse.csr_matrix  # [cells, genes of the file]
    keys: np.ndarray  # uint64 [cells]: what folds go by
    content: np.ndarray  # uint64 [cells], hashes of the counts of all genes of the file
    classes: np.ndarray  # int64 [cells]
    class_names: list[str]
    dropped_classes: dict[str, int]  # too small, or in too few groups, and their cells
    groups: np.ndarray | None = None  # int64 [cells]
    group_names: list[str] | None = None
    counted: dict[str, int]  # how many cells were used, and removed for which reason

    def class_sizes(self) -> dict[str, int]:
        """Cells in each class."""
        sizes = np.bincount(self.classes, minlength=len(self.class_names))
        return dict(zip(self.class_names, sizes.tolist(), strict=True))

    def sentences(self) -> list[str]:
        """Which cells took part, in plain words."""
        c = self.counted
        ungrouped = f"{c['ungrouped']:,} without a group, " if "ungrouped" in c else ""
        few = f"under {labels.SMALLEST_CLASS} cells"
        if self.groups is not None:
            few += f" or in fewer than {labels.FEWEST_GROUPS} groups"
        said = [
            f"{c['used']:,} of {c['total']:,} cells in {len(self.class_names)} classes; left out: {c['unlabelled']:,} without "
            f"a label, {ungrouped}{c['overlapping']:,} that a model was trained or validated on, {c['duplicates']:,} exact "
            f"duplicates, {c['in_small_classes']:,} in classes {few}."
        ]
        if self.dropped_classes:
            names = ", ".join(f"{name} ({size})" for name, size in self.dropped_classes.items())
            said.append(f"Classes {few}, left out everywhere: {names}.")
        return said


@dataclass(frozen=True, kw_only=True)
class ModelCells(LabelledCells):
    """The same for one model, on its vocabulary."""

    tokens: CellTokens
    hashes: np.ndarray  # uint64 [cells], content hashes of `tokens`
    overlap: str  # as in Guarded
    seen: dict[str, int]
    matching: dict  # which genes and counts the model knows

    def sentences(self) -> list[str]:
        return [*super().sentences(), *Guarded(np.zeros(0, dtype=bool), self.overlap, self.seen).sentences()]


def is_labelled(source: AnnDataSource, label: str) -> np.ndarray:
    """Which cells of an open source have a label, bool [cells]."""
    return _present(labels.read_labels(source.obs, label, source.name))


def read_labelled(
    source: AnnDataSource, label: str, group: str | None = None, *, progress: bool = False
) -> ReadCells:
    """The labelled cells of an open source, in its order. Of copies of one cell the one whose id has the smallest hash stays.

    `group`: a column of obs; cells without a group are left out. UserError if a column isn't there or names too little.
    """
    words = labels.read_labels(source.obs, label, source.name)
    groups = None if group is None else labels.read_labels(source.obs, group, source.name, "--group")
    labelled = _present(words)
    if not labelled.any():
        raise UserError(f"column {label!r} of {source.name} holds no label at all: choose another --label.")
    wanted = labelled if groups is None else labelled & _present(groups)
    if groups is not None and (there := len(set(groups[wanted]))) < labels.FEWEST_GROUPS:
        raise UserError(f"column {group!r} of {source.name} holds {there} groups of labelled cells, and "
                        f"{labels.FEWEST_GROUPS} are needed to train, validate and test on: choose another --group, or none.")
    counts = _read_counts(source, wanted, progress)
    rows = np.flatnonzero(wanted)
    ids = unique_ids(source.obs_names)[rows]
    keys = unit_hashes(ids)
    content = content_hash(counts.indices, counts.data, counts.indptr.astype(np.int64))
    order = np.lexsort((keys, content))
    first = np.ones(len(order), dtype=bool)
    first[1:] = content[order[1:]] != content[order[:-1]]
    once = np.sort(order[first])
    counted = {"total": source.n_cells, "unlabelled": int((~labelled).sum())}
    if groups is not None:
        counted["ungrouped"] = int((labelled & ~wanted).sum())
    counted["duplicates"] = len(rows) - len(once)
    read = ReadCells(source.name, source.identity, counts, rows, ids, keys, content, words[rows],
                     None if groups is None else groups[rows], counted)
    return read.take(once)


def choose_cells(read: ReadCells, label: str, seen: np.ndarray | None = None) -> tuple[ReadCells, LabelledCells]:
    """The cells that take part: those in classes of some size, without those that were seen (bool [cells of the file]).

    UserError if that leaves nothing to classify.
    """
    left = read if seen is None else read.take(np.flatnonzero(~seen[read.rows]))
    chosen = labels.choose_classes(left.words, left.groups)
    counted = {
        **read.counted, "overlapping": len(read.rows) - len(left.rows), "used": len(chosen.codes),
        "in_small_classes": sum(chosen.dropped.values()),
    }
    if len(chosen.names) < 2:
        raise UserError(_too_few(read.source, label, counted, len(chosen.names), left.groups is not None))
    kept = left.take(np.flatnonzero(chosen.keep))
    names, groups = (None, None) if kept.groups is None else np.unique(kept.groups.astype(str), return_inverse=True)
    return kept, LabelledCells(
        counts=kept.counts, keys=kept.keys, content=kept.content, classes=chosen.codes, class_names=chosen.names,
        dropped_classes=chosen.dropped, groups=groups, group_names=None if names is None else names.tolist(), counted=counted,
    )


def read_unseen(
    model: ExpressionModel, source: AnnDataSource, label: str, *, max_overlap: float, allow_overlap: bool, progress: bool
) -> tuple[ReadCells, Guarded, dict]:
    """The labelled cells of an open source, what the guard says of them and one model, and which genes the model knows."""
    _, matching = match(model, source, progress)  # errors first
    read = read_labelled(source, label, progress=progress)
    return read, guard(
        model, source, is_labelled(source, label), max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
    ), matching


def read_cells(
    model: ExpressionModel, source: AnnDataSource, label: str, *, max_overlap: float, allow_overlap: bool, progress: bool
) -> ModelCells:
    """Read the cells that a benchmark of one model may use; UserError if too few remain, or if it has seen too many."""
    read, guarded, matching = read_unseen(
        model, source, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
    )
    kept, cells = choose_cells(read, label, guarded.cells)
    tokens, hashes = kept.tokens_on(model.vocabulary)
    return ModelCells(
        **vars(cells), tokens=tokens, hashes=hashes, overlap=guarded.overlap, seen=guarded.seen, matching=matching
    )


def read_stored_cells(store: Store, split: str, label: str, most: int) -> ModelCells:
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
    rows = np.flatnonzero(_present(words))
    if not len(rows):
        raise UserError(f"column {label!r} of {name} holds no label at all: choose another --label.")
    # the last extent may hold more cells than were asked for
    extents = [part.read_extent(number) for number in range(len(part.extent_sizes))]
    genes, counts = (np.concatenate([extent[field] for extent in extents]) for field in (0, 1))
    lengths = np.concatenate([np.diff(extent.offsets) for extent in extents])
    cells = CellTokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]), obs["total"].to_numpy())
    content = obs["content_hash"].to_numpy()[rows]
    once = np.sort(np.unique(content, return_index=True)[1])
    chosen = labels.choose_classes(words[rows[once]])
    counted = {
        "total": part.n_cells, "unlabelled": part.n_cells - len(rows), "duplicates": len(rows) - len(once), "overlapping": 0,
        "used": len(chosen.codes), "in_small_classes": sum(chosen.dropped.values()),
    }
    if len(chosen.names) < 2:
        raise UserError(_too_few(name, label, counted, len(chosen.names), False))
    kept = once[chosen.keep]
    tokens = take(cells, rows[kept])
    matrix = scipy.sparse.csr_matrix((tokens.counts, tokens.genes, tokens.offsets), (len(kept), store.vocabulary.size))
    return ModelCells(
        counts=matrix, keys=content[kept], content=content[kept], classes=chosen.codes, class_names=chosen.names,
        dropped_classes=chosen.dropped, counted=counted, tokens=tokens, hashes=content[kept], overlap=UNSEEN, seen={},
        matching={},
    )


def take_counts(source: AnnDataSource, rows: np.ndarray) -> scipy.sparse.csr_matrix:
    """The counts of some cells, float32 CSR [rows, genes of the file]. `rows`: ascending."""
    wanted = np.zeros(source.n_cells, dtype=bool)
    wanted[rows] = True
    return _read_counts(source, wanted, False).astype(np.float32)


def _read_counts(source: AnnDataSource, wanted: np.ndarray, progress: bool) -> scipy.sparse.csr_matrix:
    """The counts of some cells (bool [cells]) as they are read, CSR [chosen cells, genes], without stored zeros."""
    parts = []
    with progress_bar("reading", source.n_cells, progress) as advance:
        for start, read in embed.chunks(source):
            shape = (len(read.offsets) - 1, len(source.identity.ids))
            matrix = scipy.sparse.csr_matrix((read.counts, read.columns, read.offsets), shape)
            part = matrix[np.flatnonzero(wanted[start : start + shape[0]])]
            part.eliminate_zeros()
            parts.append(part)
            advance(shape[0])
    return scipy.sparse.vstack(parts, format="csr")


def _present(words: np.ndarray) -> np.ndarray:
    """bool [cells]: the word is not missing."""
    return np.array([word is not None for word in words], dtype=bool)


def _join(parts: list[CellTokens]) -> CellTokens:
    """The cells of all parts."""
    genes, counts, totals = (np.concatenate([part[field] for part in parts]) for field in (0, 1, 3))
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return CellTokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]), totals)


def _too_few(source: str, label: str, counted: dict[str, int], classes: int, grouped: bool) -> str:
    """Why there is nothing to classify, and what to do."""
    remain = counted["used"] + counted["in_small_classes"]
    each = f"at least {labels.SMALLEST_CLASS} cells" + (f" in {labels.FEWEST_GROUPS} groups" if grouped else "")
    reason = f"{source}: {remain:,} labelled cells are left, with {classes} classes of {each} in {label!r}, and two are needed"
    if counted["overlapping"]:
        return (
            f"{reason}; {counted['overlapping']:,} were removed because the model was trained or validated on them: give "
            "other cells, or --allow-overlap to keep them."
        )
    return f"{reason}: choose another --label or give more cells."
