"""What scbench writes, judged by other people's packages: scib-metrics, cz-benchmarks and cell-eval.

    python benchmarks/interoperability.py scib-metrics EMBEDDED.h5ad --label cell_type [--batch donor]
    python benchmarks/interoperability.py cz-benchmarks EMBEDDED.h5ad --label cell_type
    python benchmarks/interoperability.py cell-eval predictions.h5ad --real CELLS.h5ad --perturbation-column condition \
        --control control [--total-counts-column ncounts] [--context cell_type …]

The first two take what `scbench embed` writes: embeddings in obsm, counts in X. Beside the embedding stands PCA of log1p of
counts per 10,000. The third takes the predictions.h5ad that `scbench benchmark perturbation` writes beside its table, and the
cells that it was given; it scores one repetition, each context by itself. Each package may live in an environment of its own,
with scbench; `--json PATH` keeps the rows.
"""

import argparse
import json
import logging
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import record
import scipy.sparse
from sklearn import decomposition
from sklearn.neighbors import NearestNeighbors

PCA = "PCA"
COMPONENTS = 50
UNIT = 10_000  # counts per so many
ONE_CELL = ["pearson_edistance"]  # metrics of cell-eval that need several predicted cells a perturbation


def embedded_cells(path: Path, label: str, embeddings: list[str]) -> anndata.AnnData:
    """The labelled cells: log1p of counts per 10,000 in X, their PCA in obsm beside the embeddings."""
    cells = anndata.read_h5ad(path)
    if missing := [key for key in embeddings if key not in cells.obsm]:
        raise SystemExit(f"{path} has no {missing[0]!r} in obsm (there are: {', '.join(cells.obsm) or 'nothing'}).")
    check_columns(cells, [label], path)
    words = cells.obs[label].astype(object)
    cells = cells[(words.notna() & (words != "")).to_numpy()].copy()
    cells.obs[label] = cells.obs[label].astype(str).astype("category")
    cells.X = log_normalised(cells.X)
    components = decomposition.PCA(min(COMPONENTS, min(cells.shape) - 1), svd_solver="arpack", random_state=0)
    cells.obsm[PCA] = components.fit_transform(cells.X).astype(np.float32)
    return cells


def log_normalised(counts: object, totals: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
    """log1p of counts per 10,000 of `totals`, by default of each cell's sum."""
    counts = scipy.sparse.csr_matrix(counts, dtype=np.float32)
    totals = np.asarray(counts.sum(axis=1)).ravel() if totals is None else totals
    return (scipy.sparse.diags(UNIT / np.maximum(totals, 1)) @ counts).log1p().tocsr().astype(np.float32)


def check_columns(cells: anndata.AnnData, columns: list[str], path: Path) -> None:
    for column in columns:
        if column not in cells.obs:
            raise SystemExit(f"{path} has no column {column!r} in obs (there are: {', '.join(cells.obs)}).")


def scib_metrics(options: argparse.Namespace) -> list[dict]:
    """Every metric of scib-metrics' Benchmarker; without a batch column those of biology alone."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    cells = embedded_cells(options.file, options.label, options.embedding)
    check_columns(cells, [options.batch] if options.batch else [], options.file)
    biology = BioConservation(isolated_labels=options.batch is not None)  # these are found by their batches
    batch, correction = options.batch, BatchCorrection()
    if batch is None:
        batch, correction = "one batch", None
        cells.obs[batch] = "0"
    judge = Benchmarker(
        cells, batch, options.label, [*options.embedding, PCA], biology, correction, PCA, progress_bar=False,
    )
    judge.prepare(neighbours)
    judge.benchmark()
    found = judge.get_results().drop(index="Metric Type")
    return [{"embedding": name, "metric": metric, "value": float(found.loc[name, metric])}
            for name in found.index for metric in found.columns]


def neighbours(values: np.ndarray, k: int) -> object:
    """The k nearest cells of each, itself first, exactly: the package's own search first compiles for minutes."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=k).fit(values).kneighbors(values)
    return NeighborsResults(indices=indices, distances=distances)


def cz_benchmarks(options: argparse.Namespace) -> list[dict]:
    """cz-benchmarks' tasks label prediction and clustering."""
    from czbenchmarks.tasks import (
        ClusteringTask,
        ClusteringTaskInput,
        MetadataLabelPredictionTask,
        MetadataLabelPredictionTaskInput,
    )

    cells = embedded_cells(options.file, options.label, options.embedding)
    labels, rows = cells.obs[options.label], []
    for name in [*options.embedding, PCA]:
        values = np.asarray(cells.obsm[name])
        for task, given in [
            (MetadataLabelPredictionTask(random_seed=0), MetadataLabelPredictionTaskInput(labels=labels)),
            (ClusteringTask(random_seed=0), ClusteringTaskInput(obs=cells.obs, input_labels=labels)),
        ]:
            for result in task.run(values, given):
                metric = " ".join([result.metric_type.value, *map(str, result.params.values())])
                rows.append({"embedding": name, "metric": metric, "value": float(result.value)})
    return rows


def cell_eval(options: argparse.Namespace) -> list[dict]:
    """cell-eval's metrics of mean profiles, the mean over perturbations, in each context."""
    from cell_eval import MetricsEvaluator

    from scbench.evaluation.perturbation.names import targets_of

    predicted, real = anndata.read_h5ad(options.file), anndata.read_h5ad(options.real)
    check_columns(predicted, ["repetition", "perturbation", "context"], options.file)
    totals = [options.total_counts_column] if options.total_counts_column else []
    check_columns(real, [options.perturbation_column, *options.context, *totals], options.real)
    real.X = log_normalised(real.X, real.obs[totals[0]].to_numpy(dtype=np.float64) if totals else None)
    columns = [real.obs[name].astype(str).str.strip() for name in options.context]
    genes = set(real.var_names)
    names = {name: "+".join(targets_of(str(name).strip(), options.control, genes)) or options.control
             for name in real.obs[options.perturbation_column].dropna().unique()}
    real.obs["perturbation"] = real.obs[options.perturbation_column].map(names).astype(object)
    real.obs["context"] = [" / ".join(one) for one in zip(*columns, strict=True)] if columns else ""
    predicted = predicted[predicted.obs["repetition"] == options.repetition].copy()
    predicted.X = np.maximum(predicted.X, 0)  # cell-eval takes nothing under 0 for log1p
    found = []
    for context in sorted(predicted.obs["context"].astype(str).unique()):
        pair = [cells[(cells.obs["context"].astype(str) == context).to_numpy()] for cells in (predicted, real)]
        shared = set(pair[0].obs["perturbation"]) & set(pair[1].obs["perturbation"].dropna())
        ours, theirs = (cells[cells.obs["perturbation"].isin(shared).to_numpy(), predicted.var_names].copy() for cells in pair)
        for cells in (ours, theirs):
            cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).astype("category")
        theirs.X = theirs.X.toarray()
        with tempfile.TemporaryDirectory() as folder:
            judge = MetricsEvaluator(ours, theirs, control_pert=options.control, pert_col="perturbation", outdir=folder,
                                     num_threads=1, skip_de=True)
            by_perturbation, _ = judge.compute("anndata", skip_metrics=ONE_CELL, write_csv=False, break_on_error=True)
        scores = by_perturbation.drop("perturbation").mean().row(0, named=True)
        found += [{"context": context or "all", "perturbations": len(by_perturbation), "metric": metric, "value": value}
                  for metric, value in scores.items()]
    return found


PACKAGES = {"scib-metrics": scib_metrics, "cz-benchmarks": cz_benchmarks, "cell-eval": cell_eval}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    packages = parser.add_subparsers(dest="package", required=True)
    for name in PACKAGES:
        one = packages.add_parser(name)
        one.add_argument("file", type=Path)
        one.add_argument("--json", type=Path)
        if name == "cell-eval":
            one.add_argument("--real", type=Path, required=True)
            one.add_argument("--perturbation-column", required=True)
            one.add_argument("--control", required=True)
            one.add_argument("--total-counts-column")
            one.add_argument("--context", nargs="*", default=[])
            one.add_argument("--repetition", type=int, default=0)
            continue
        one.add_argument("--label", required=True)
        one.add_argument("--embedding", nargs="+", default=["X_scbench"], help="keys of obsm")
        if name == "scib-metrics":
            one.add_argument("--batch")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        release = version(options.package)
    except PackageNotFoundError:
        raise SystemExit(f"{options.package} is not installed here: pip install {options.package}, beside scbench.") from None
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [{"package": options.package, "version": release, **row} for row in PACKAGES[options.package](options)]
    frame = pd.DataFrame(rows)
    across = "context" if options.package == "cell-eval" else "embedding"
    table = frame.pivot(index="metric", columns=across, values="value").loc[frame["metric"].unique(), frame[across].unique()]
    print(f"{options.package} {release} on {options.file.name}")
    record.print_table(["metric", *table.columns], [[metric, *(f"{value:.3f}" for value in line)]
                                                   for metric, line in zip(table.index, table.to_numpy(), strict=True)])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
