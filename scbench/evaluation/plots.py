"""Pictures of a run: the loss curve, and embeddings in pairs (coloured by label, and by depth).

A picture of an embedding by label alone cannot show that what separates the cells is their depth; hence the pairs.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from scbench.files import published_file
from scbench.kernels import random
from scbench.kernels.random import Stream

MOST_CELLS = 1500  # t-SNE of a few thousand takes longer than all the rest of a demo
_PLOT = 3  # what a key of Stream.EVALUATION decides, beside those of scores.py and entrants.py
# Okabe and Ito's colours, told apart by all common kinds of colour blindness; past seven classes the marker changes too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "^", "s", "X", "D", "v", "P", "*")
_MOST_NAMED = len(COLOURS) * len(_MARKERS)


def plot_loss(metrics: Path, path: Path) -> None:
    """The training loss of each step and the validation loss, from a run's metrics.jsonl to a PNG."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for field, name, style in [
        ("loss", "training", {"color": COLOURS[4], "linewidth": 1}),
        ("validation_loss", "validation", {"color": COLOURS[5], "marker": "o", "linewidth": 1.5}),
    ]:
        points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss (mean squared error of masked genes)", title="Pretraining", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save(figure, path)


def plot_embedding(embedding: np.ndarray, labels: np.ndarray, log_totals: np.ndarray, title: str, path: Path) -> None:
    """A t-SNE map of cells, twice: coloured by label and by log total counts; a PNG.

    Parameters
    ----------
    embedding
        float [cells, D]. At most 1,500 cells, drawn at random, are shown.
    labels
        object [cells], None where missing.
    log_totals
        float [cells].
    title, path
        Of the picture.
    """
    order = random.permutation(random.key(0, Stream.EVALUATION, _PLOT), len(embedding))
    shown = np.sort(order[:MOST_CELLS])
    perplexity = min(30, max(1, (len(shown) - 1) // 3))
    with threadpool_limits(1):  # the threads of so small a problem mostly wait for each other
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(embedding[shown])
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _by_label(left, points, labels[shown])
    colours = right.scatter(*points.T, c=log_totals[shown], s=9, cmap="viridis", linewidths=0)
    figure.colorbar(colours, ax=right, label="log total counts")
    for axes, by in [(left, "label"), (right, "depth")]:
        axes.set(title=f"by {by}", xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    figure.suptitle(f"{title} ({len(shown):,} of {len(embedding):,} cells)" if len(shown) < len(embedding) else title)
    save(figure, path)


def _by_label(axes: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    """The points by label: the most frequent ones named, the rest and the missing in grey."""
    known = labels[[label is not None for label in labels]].astype(str)
    names, sizes = np.unique(known, return_counts=True)
    named = sorted(names[np.argsort(-sizes, kind="stable")[:_MOST_NAMED]])
    rest = ~np.isin(labels.astype(str), named)
    if rest.any():
        axes.scatter(*points[rest].T, s=9, c="#BBBBBB", linewidths=0, label="other or none")
    for number, name in enumerate(named):
        marker = _MARKERS[number // len(COLOURS)]
        inside = labels == name
        axes.scatter(*points[inside].T, s=12, c=COLOURS[number % len(COLOURS)], marker=marker, linewidths=0, label=name)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, markerscale=2, ncols=1 + len(named) // 20,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    with published_file(path) as partial:
        FigureCanvasAgg(figure).print_figure(partial, format="png", dpi=150)
