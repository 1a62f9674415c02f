"""The reference implementation's processed cells: a `.pt` file, a dict of the lists `genes`, `expressions` and a label.

`genes` holds each cell's token ids, `expressions` their values as a model is to see them (log1p already), `cls_name` a
class a cell and `single_ctrl` the token id of the gene that was perturbed in it, −1 for none (control).

The file is a pickle. Nothing that it asks for is executed: tensors, plain values and the numpy types listed here are read,
and a file with anything else is refused.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pandas as pd
import torch

from scbench.config import Values
from scbench.data.cells import MAX_COUNT, Counts
from scbench.data.counts import undo_log1p
from scbench.data.gene_identity import GeneIdentity, own_tokens, vocabulary_identity
from scbench.data.obs import CELL_LISTS
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

CLASS, PERTURBED = "cls_name", "single_ctrl"  # the labels that such a file may hold
CONTROL, CONTROL_NAME = -1, "control"  # in PERTURBED, and as a class
LARGEST_VALUE = float(np.log1p(MAX_COUNT))
REFERENCE_VOCABULARY = "4cd63ebbf48d5d3ed8d01d6048d773e3728150ade298c2c4b3ab4efdd105c5a5"  # fingerprint of the 60,697 tokens

_array, _scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]  # what makes arrays and numbers again
_DTYPES = ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "U", "O")
ALLOWED = [  # what a file may name, under the names that numpy 1 and numpy 2 write; bytes is that of no bytes
    *((made, f"numpy.{core}.multiarray.{made.__name__}") for core in ("core", "_core") for made in (_array, _scalar)),
    np.ndarray, np.dtype, *{type(np.dtype(name)) for name in _DTYPES}, bytes,
]


def is_reference_pt(source: object) -> bool:
    """Whether a source is such a file, by its name."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".pt"


class ReferencePtSource:
    """The cells of such a file, held in memory; to be read like those of an AnnDataSource.

    Its counts are what the values are log1p of, so that a model that takes log1p of counts sees the file's values: whole
    counts, or, if any value is no log1p of a whole count (they were normalised, say), expm1 of the values. A gene of value 0
    is one that the cell does not express.

    Parameters
    ----------
    path
        The .pt file; both formats of torch.save will do.
    vocabulary
        What its token ids are of.

    Raises
    ------
    UserError
        If the file is no such dict of lists, names anything to execute, or holds values that are no log1p.
    """

    kind = "pt"
    layer = CELL_LISTS[1]
    values: Values = "as_is"
    recovered = None
    obsm_keys = ()

    def __init__(self, path: Path | str, vocabulary: Vocabulary):
        path = Path(path)
        self.name = path.name
        columns = _columns(_load(path), path)
        genes, lengths = _joined(columns[CELL_LISTS[0]], CELL_LISTS[0], path)
        values, value_lengths = _joined(columns[CELL_LISTS[1]], CELL_LISTS[1], path)
        uneven = np.flatnonzero(lengths != value_lengths)
        if len(uneven):
            cell = int(uneven[0])
            raise UserError(f"cell {cell} of {path} has {lengths[cell]} genes but {value_lengths[cell]} expressions: "
                            "write the file again with lists of one length.")
        cells = np.repeat(np.arange(len(lengths)), lengths)
        self._columns = _token_ids(genes, vocabulary, lambda at: f"cell {cells[at]} of {path}")
        _check_values(values, cells, path)
        _check_distinct(self._columns, cells, path)
        counts, problem = undo_log1p(values)
        self.whole = problem is None
        self._counts = counts.astype(np.uint32) if self.whole else np.expm1(values)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.n_cells = len(lengths)
        self.obs_names = np.array([str(cell) for cell in range(self.n_cells)], dtype=object)
        # by its name in the vocabulary each gene is itself, also where two names lead to one gene
        organism = vocabulary_identity(vocabulary).organism
        self.identity = GeneIdentity([None] * vocabulary.size, list(vocabulary.names), organism)
        self.perturbed = _perturbed(columns, self.n_cells, vocabulary, path)  # int64 [cells], token ids, or None
        labels = {CLASS: _classes(columns[CLASS], path)} if CLASS in columns else {}
        if self.perturbed is not None:
            named = [CONTROL_NAME if id_ == CONTROL else vocabulary.names[id_] for id_ in self.perturbed]
            labels[PERTURBED] = np.array(named, dtype=object)
        self.obs = pd.DataFrame(labels, index=self.obs_names)

    def __enter__(self) -> "ReferencePtSource":
        return self

    def __exit__(self, *_) -> None:
        """Nothing is open."""

    def read(self, start: int, stop: int) -> Counts:
        """The counts of cells `start` … `stop`−1."""
        offsets = self._offsets[start : stop + 1]
        tokens = slice(offsets[0], offsets[-1])
        return Counts(self._columns[tokens], self._counts[tokens], offsets - offsets[0])


def _load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror or error}.") from error
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {named[1]}" if named else "holds more than lists of numbers and names"
        raise UserError(f"{path} {what}, and scbench executes no pickle: save a dict of the lists genes, expressions and "
                        f"{CLASS} (or {PERTURBED}) with torch.save.") from error
    except Exception as error:  # on a file of another kind torch.load raises whatever its parser stumbles over
        raise UserError(f"{path} is not a file written by torch.save, or it is damaged: copy it again.") from error


def _columns(content: object, path: Path) -> dict:
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of the lists genes, expressions and {CLASS} (or "
                        f"{PERTURBED}): give the reference's processed cells.")
    there = ", ".join(map(str, list(content)[:6])) or "nothing"
    missing = [column for column in CELL_LISTS if column not in content]
    if missing or not {CLASS, PERTURBED} & content.keys():
        what = " and ".join(missing) or f"{CLASS} or {PERTURBED}"
        raise UserError(f"{path} holds no {what}, but {there}: give the reference's processed cells.")
    columns = {column: content[column] for column in (*CELL_LISTS, CLASS, PERTURBED) if column in content}
    for column, values in columns.items():
        if not isinstance(values, list | tuple | np.ndarray | torch.Tensor) or getattr(values, "ndim", 1) == 0:
            raise UserError(f"{column} of {path} is a {type(values).__name__}, not a list with an entry a cell: "
                            "write the file again.")
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} of {column}" for column, length in lengths.items())
        raise UserError(f"the lists of {path} differ in length ({listed}): write the file again with an entry a cell in each.")
    if not len(columns[CELL_LISTS[0]]):
        raise UserError(f"{path} has no cells.")
    return columns


def _joined(rows: Iterable, column: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all rows side by side, float64, and how many each has, int64 [cells]."""
    arrays = []
    for cell, row in enumerate(rows):
        try:
            array = np.asarray(row if len(row) else np.zeros(0))
        except (TypeError, ValueError):
            array = np.array(None)
        if array.ndim != 1 or array.dtype.kind not in "biuf":
            raise UserError(f"{column} of {path} holds no list of numbers for cell {cell}: write the file again with a list "
                            "a cell.")
        arrays.append(array.astype(np.float64))
    return np.concatenate(arrays), np.array([len(array) for array in arrays], dtype=np.int64)


def _token_ids(ids: np.ndarray, vocabulary: Vocabulary, place: Callable[[int], str]) -> np.ndarray:
    """`ids` as int64, each a gene's; `place` says where number i of them is."""
    is_gene = own_tokens(vocabulary) >= 0
    tokens = np.where((ids >= 0) & (ids < len(is_gene)), ids, 0).astype(np.int64)  # NaN is not in the range
    wrong = (tokens != ids) | ~is_gene[tokens]
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{place(at)} has the gene id {ids[at]:.9g}, which the model's vocabulary gives to no gene: give a "
                        "model on the vocabulary that the file was written with.")
    return tokens


def _check_values(values: np.ndarray, cells: np.ndarray, path: Path) -> None:
    for reason, bad in [
        ("NaN", np.isnan(values)), ("negative values", values < 0),
        (f"values over log1p(2³²−1) = {LARGEST_VALUE:.1f}", values > LARGEST_VALUE),
    ]:
        if bad.any():
            at = int(np.argmax(bad))
            raise UserError(f"the expressions of {path} are no log1p of counts or of normalised counts, but hold {reason} "
                            f"({values[at]:g} in cell {cells[at]}): write the file again from such values.")


def _check_distinct(tokens: np.ndarray, cells: np.ndarray, path: Path) -> None:
    order = np.lexsort((tokens, cells))
    twice = np.flatnonzero((np.diff(tokens[order]) == 0) & (np.diff(cells[order]) == 0))
    if len(twice):
        at = order[twice[0]]
        raise UserError(f"cell {cells[at]} of {path} has the gene id {tokens[at]} twice: write the file again with each gene "
                        "of a cell once.")


def _classes(column: Iterable, path: Path) -> np.ndarray:
    """Names or numbers of classes, object [cells]; None where one is missing."""
    one = (torch.Tensor, np.generic)
    classes = [label.item() if isinstance(label, one) and np.ndim(label) == 0 else label for label in column]
    odd = [type(label).__name__ for label in classes if not isinstance(label, str | int | float | None)]
    if odd:
        raise UserError(f"{CLASS} of {path} holds a {odd[0]} for a cell: write the file again with a name a cell.")
    return pd.Series(classes, dtype=object).to_numpy()


def _perturbed(columns: dict, n_cells: int, vocabulary: Vocabulary, path: Path) -> np.ndarray | None:
    """The token id of the perturbed gene, or CONTROL, int64 [cells]; None if the file doesn't say."""
    if PERTURBED not in columns:
        return None
    try:
        ids = np.asarray(columns[PERTURBED], dtype=np.float64).reshape(n_cells)
    except (TypeError, ValueError):
        raise UserError(f"{PERTURBED} of {path} is no token id a cell (−1 for control): write the file again.") from None
    rows = np.flatnonzero(ids != CONTROL)
    perturbed = np.full(n_cells, CONTROL)
    perturbed[rows] = _token_ids(ids[rows], vocabulary, lambda at: f"{PERTURBED} of cell {rows[at]} of {path}")
    return perturbed
