"""AnnData whose values are logarithms: log1p of whole counts, or whatever a model is to see as it is."""

from pathlib import Path

import numpy as np
from anndata import AnnData

from scbench.config import Values
from scbench.data.cells import Counts
from scbench.data.counts import undo_log1p
from scbench.data.sources.anndata import AnnDataSource, called
from scbench.data.sources.matrix import Matrix
from scbench.data.sources.stored import Candidate
from scbench.errors import UserError


class LogarithmSource(AnnDataSource):
    """The cells of a file whose values are log1p of something; to be read like those of an AnnDataSource.

    Its counts are what the values are log1p of, so that a model that takes log1p of counts sees the file's values, as with a
    ReferencePtSource: whole counts (log1p_counts), or expm1 of the values (as_is, float64).

    Parameters
    ----------
    source, genes_column
        As of an AnnDataSource.
    values
        log1p_counts: every expm1 must be a whole number, as near as float32 leaves it (`undo_log1p`). as_is: any values from
        0 to log1p(2³²−1).
    layer
        Where they are; by default X.

    Raises
    ------
    UserError
        If the source cannot be read; when rows are read, if a value is not what it should be.
    """

    def __init__(
        self, source: Path | str | AnnData, values: Values, *, layer: str | None = None, genes_column: str | None = None
    ):
        self._values: Values = values
        super().__init__(source, layer=layer, genes_column=genes_column)

    @property
    def values(self) -> Values:
        """What the file holds."""
        return self._values

    def read(self, start: int, stop: int) -> Counts:
        """What the values of cells `start` … `stop`−1 are log1p of; UserError names the cell if a value is not."""
        rows = self._rows(start, stop)
        self._check_recoverable(rows, start)
        as_is = self._values == "as_is"
        counts, problem = undo_log1p(rows.values, fractional=as_is)
        if problem is not None:
            advice = "give the log1p of them" if as_is else "take them --values as_is, or lognorm if they were normalised"
            raise UserError(
                f"{called(self.layer)} of {self.name} holds {problem.reason} ({problem.value:g} in cell "
                f"{self._cell(rows, start, problem.position)!r}), so it is no {self._values}: {advice}."
            )
        counts = np.expm1(rows.values.astype(np.float64)) if as_is else counts.astype(np.uint32)
        return Counts(rows.columns, counts, rows.offsets)

    def _choose(self, candidates: dict[str, Candidate], layer: str | None, _: bool) -> tuple[Candidate, Matrix, bool]:
        """The layer that is named, unread."""
        layer = layer or "X"
        self._check_layer(candidates, layer)
        return candidates[layer], self._open(candidates[layer]), False
