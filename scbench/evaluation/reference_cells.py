"""What a classification benchmark reads: AnnData and a column of obs, or the reference's .pt file, which implies the label."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import anndata

from scbench.config import Values
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.reference_pt import REFERENCE_VOCABULARY, ReferencePtSource, is_reference_pt
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.models.model import ExpressionModel


@contextlib.contextmanager
def labelled_source(
    model: ExpressionModel | None, source: AnnDataSource | anndata.AnnData | Path | str, label: str | None, *,
    layer: str | None = None, genes_column: str | None = None, values: Values = "counts",
) -> Iterator[tuple[AnnDataSource | ReferencePtSource, str]]:
    """The opened source and the name of its label. UserError if it can't be read, or if no label is given or implied.

    `values`: as in `embed.opened`; those of a .pt file are always as_is.
    """
    if is_reference_pt(source):
        opened = open_reference_pt(source, model)
        for option, value in [("--layer", layer), ("--genes-column", genes_column)]:
            if value is not None:
                raise UserError(f"{option} goes with AnnData, not with the token ids of {opened.name}: leave it out.")
        if values not in ("counts", opened.values):
            raise UserError(f"the values of {opened.name} are taken as they are, not as {values}: leave --values out.")
        if label is None and len(opened.obs.columns) > 1:
            raise UserError(f"{opened.name} holds {' and '.join(opened.obs.columns)}: say with --label which to predict.")
        yield opened, label or opened.obs.columns[0]
        return
    if label is None:
        raise UserError("--label is missing: say which column of obs the benchmark should predict.")
    with embed.opened(source, layer=layer, genes_column=genes_column, values=values) as opened:
        yield opened, label


def open_reference_pt(path: Path | str, model: ExpressionModel | None) -> ReferencePtSource:
    """The cells of a .pt file for a model whose token ids are the reference's; UserError for any other model, or for none."""
    if model is None:
        raise UserError(f"{path} holds token ids of the reference's vocabulary: give a model directory with them, or an h5ad "
                        "file.")
    if model.vocabulary.fingerprint != REFERENCE_VOCABULARY and "imported_from" not in model.provenance:
        raise UserError(
            f"{path} holds token ids of the reference's vocabulary, and the model has another one: give a model made by "
            "scbench import-reference, or pretrained on a store prepared with the reference's --vocabulary."
        )
    return ReferencePtSource(path, model.vocabulary)


def described(source: AnnDataSource | ReferencePtSource) -> dict:
    """Where the values come from and what they are, JSON-able."""
    return {"name": source.name, "layer": source.layer, "recovered_counts": source.recovered, "values": source.values}


def values_sentences(source: AnnDataSource | ReferencePtSource) -> list[str]:
    """What must be said about values that are no counts."""
    if source.values == "counts":
        return []
    if source.values == "log1p_counts":
        return [f"Values of {source.name} are log1p of whole counts (log1p_counts): their expm1 stands for counts."]
    if source.values == "lognorm":
        return [
            f"Counts of {source.name} were recovered from log-normalised values (lognorm), a cell's smallest being one count: "
            f"{source.recovered['inexact_share']:.2%} of the values are no whole multiples of it. A cell without a count of 1 "
            "gets too small counts, and the leakage guard cannot know such a cell by its counts."
        ]
    if isinstance(source, ReferencePtSource) and source.whole:
        return [f"Values of {source.name} as they are (as_is): all are log1p of whole counts."]
    known = "they are no log1p of whole counts" if isinstance(source, ReferencePtSource) else "nothing is asked of them"
    return [
        f"Values of {source.name} as they are (as_is): {known}. A model that was trained on counts may see what it never saw, "
        "baselines take their expm1 for counts, and the leakage guard can know no cell by its counts."
    ]
