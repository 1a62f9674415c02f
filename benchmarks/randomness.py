"""How well are the cells of a batch mixed, if the cells came sorted by donor? Entropy of their labels against a true shuffle.

    python benchmarks/randomness.py DATA/onek1k_1000g.h5ad --label donor --json donors.json --plot donors.png
    python benchmarks/randomness.py DATA/pbmc_7datasets.h5ad DATA/pbmc3k.h5ad DATA/heart_san.h5ad --label dataset

The label of a cell is its file, and its value in the column --label where the file has that one. Real cells are repeated and
thinned up to --cells, and `scbench prepare` makes stores of files that hold one label each. Three orders on the disk:

shuffled   one store of all files, the default
parts      the files in --parts parts (`scbench prepare --part i/n`), merged: cells are shuffled within a part only
sorted     no shuffle at all: the same extents, label after label

and from each of them batches are drawn by

scbench    its order (scbench/data/order.py), for every --lanes and --extent-megabytes
blocks     what other loaders do: runs of consecutive cells at random, shuffled in a buffer (256 cells × 32, as annbatch;
           16 × 1,024, as scDataset), by number only
true       a permutation of all cells: what every other line is compared to

All numbers are of whole epochs. `chi_square_z` says how far the table of batches × labels is from independence, in standard
deviations of true shuffles; `repeated_pairs` how often two cells of a batch meet again in the next epoch, against chance.
"""

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import machine
import numpy as np
import tyro
from record import print_table, write
from thinned import read_cells, repeat
from tyro.conf import Positional

from scbench.data.merge import merge
from scbench.data.order import SampleOrder
from scbench.data.prepare import prepare
from scbench.data.shard_format import BLOCK_CELLS
from scbench.data.store import VOCABULARY_FILE, Store
from scbench.errors import UserError

EPOCHS = 2
TRUE_SHUFFLES = 30  # what their statistics spread by
BLOCKS = ((256, 32), (16, 1024))  # cells a block, blocks a buffer
IDENTITY = ("disk", "drawn_by", "lanes", "extent_megabytes")


@dataclass(frozen=True, kw_only=True)
class RandomnessOptions:
    """Measure how batches mix labels."""

    inputs: Positional[tuple[Path, ...]]
    """h5ad files with raw counts in X."""
    label: str | None = None
    """Column of obs."""
    cells: int = 200_000
    """Cells to have at least."""
    parts: int = 8
    """Parts that the cells are prepared in."""
    batch_cells: int = 128
    """Cells a batch."""
    lanes: tuple[int, ...] = (1, 2, 8, 64)
    """Extents that scbench mixes at a time."""
    extent_megabytes: tuple[float, ...] = (0.5, 2.0, 8.0)
    """Sizes of an extent (a store has 8)."""
    workers: int = 1
    """Processes of prepare."""
    seed: int = 0
    """Of everything."""
    work: Path | None = None
    """Where to put the stores (removed afterwards)."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""
    plot: Path | None = None
    """PNG of the entropies."""

    def __post_init__(self) -> None:
        if not self.inputs or not self.lanes or not self.extent_megabytes:
            raise UserError("name one h5ad file or more, and at least one of --lanes and of --extent-megabytes.")
        if self.parts < 1 or self.batch_cells < 2:
            raise UserError(f"--parts is {self.parts} and --batch-cells {self.batch_cells}: at least 1 and 2 are needed.")
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")


class Disk(NamedTuple):
    """Cells in the order of a disk, and how many of them are in a megabyte."""

    labels: np.ndarray  # int64 [cells]
    shards: list[tuple[int, float]]  # cells and bytes of each shard, in order

    def extent_sizes(self, megabytes: float) -> np.ndarray:
        """The cells of each extent, if an extent had that size (as ShardInfo.plan has it)."""
        sizes = []
        for cells, size in self.shards:
            extents = max(1, round(size / (megabytes * 1e6)))
            each = math.ceil(math.ceil(cells / BLOCK_CELLS) / extents) * BLOCK_CELLS
            sizes.append(np.diff(np.append(np.arange(0, cells, each), cells)))
        return np.concatenate(sizes)


def sorted_files(options: RandomnessOptions, folder: Path) -> list[Path]:
    """A file for each label, in `folder`."""
    rng = np.random.default_rng(options.seed)
    inputs = [read_cells(file) for file in options.inputs]
    copies = -(-options.cells // sum(cells.n_obs for cells in inputs))
    files = []
    for file, cells in zip(options.inputs, inputs, strict=True):
        labels = cells.obs[options.label].astype(str) if options.label in cells.obs else np.full(cells.n_obs, file.stem)
        for label in sorted(set(labels)):
            files.append(folder / f"{len(files):04d}.h5ad")
            repeat(cells[np.asarray(labels == label)], copies, rng).write_h5ad(files[-1])
    if len(files) < max(2, options.parts):
        raise UserError(f"{len(files)} labels are too few for {options.parts} --parts: give more files or fewer parts.")
    return files


def read_disk(store: Store) -> Disk:
    """The cells of a store."""
    split = store.split("train")
    token_bytes = [np.dtype(shard.genes).itemsize + np.dtype(shard.counts).itemsize for shard in split.shards]
    return Disk(
        labels=split.cells(["source"])["source"].str.slice(0, 4).astype(int).to_numpy(),
        shards=[(shard.cells, shard.nnz * each) for shard, each in zip(split.shards, token_bytes, strict=True)],
    )


def make_disks(options: RandomnessOptions) -> dict[str, Disk]:
    """The three orders on the disk."""
    with tempfile.TemporaryDirectory(dir=options.work, prefix="randomness-") as name:
        folder = Path(name)
        files = sorted_files(options, folder)

        how = {"split": (1, 0, 0), "seed": options.seed, "workers": options.workers}
        whole = prepare(files, folder / "whole", **how)
        how["vocabulary"] = whole.path / VOCABULARY_FILE
        parts = [folder / f"part-{number}" for number in range(1, options.parts + 1)]
        for number, part in enumerate(parts, start=1):
            prepare(files, part, part=f"{number}/{options.parts}", **how)
        shuffled, merged = read_disk(whole), read_disk(merge(parts, folder / "merged"))
    return {"shuffled": shuffled, "parts": merged, "sorted": Disk(np.sort(shuffled.labels), shuffled.shards)}


def scbench_epochs(sizes: np.ndarray, lanes: int, seed: int) -> Iterator[np.ndarray]:
    """The cells of each epoch in training order, by their number on the disk."""
    order = SampleOrder(sizes, seed, lanes)
    for epoch in itertools.count():
        located = order.locate(epoch * order.n_cells, (epoch + 1) * order.n_cells)
        yield order.starts[located.extents] + located.indices


def block_epochs(cells: int, block: int, blocks: int, seed: int) -> Iterator[np.ndarray]:
    """The same for runs of `block` cells, taken at random and shuffled `blocks` at a time."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(0, cells, block))
        read = np.concatenate([np.arange(start, min(start + block, cells)) for start in starts])
        edges = np.arange(block * blocks, cells, block * blocks)
        yield np.concatenate([rng.permutation(buffer) for buffer in np.split(read, edges)])


def true_epochs(cells: int, seed: int) -> Iterator[np.ndarray]:
    """The same for a true shuffle."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.permutation(cells)


class Mixing(NamedTuple):
    """What is said of an epoch."""

    entropies: np.ndarray  # float64 [batches], bits
    chi_square: float  # of the table of batches × labels


def batch_numbers(cells: np.ndarray, batch_cells: int) -> np.ndarray:
    """The batch of each cell of an epoch, int64 [cells]; −1 for those left over at its end."""
    batches = np.full(len(cells), -1)
    whole = len(cells) // batch_cells * batch_cells
    batches[cells[:whole]] = np.arange(whole) // batch_cells
    return batches


def label_table(batches: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many cells of each label are in each batch, int64 [batches, labels]."""
    n_labels = labels.max() + 1
    keep = batches >= 0
    table = np.bincount(batches[keep] * n_labels + labels[keep], minlength=(batches.max() + 1) * n_labels)
    return table.reshape(-1, n_labels)


def mixing(batches: np.ndarray, labels: np.ndarray) -> Mixing:
    """Entropies of the batches' labels, and Pearson's statistic."""
    table = label_table(batches, labels)
    shares = table / table.sum(1, keepdims=True)
    expected = table.sum(1, keepdims=True) * (table.sum(0) / table.sum())
    return Mixing(
        entropies=0.0 - (shares * np.log2(np.where(table, shares, 1))).sum(1),
        chi_square=float(((table - expected) ** 2 / np.where(expected, expected, 1)).sum()),
    )


def repeated_pairs(one: np.ndarray, other: np.ndarray) -> float:
    """Pairs of cells that share a batch in both epochs, over the pairs expected if the epochs were independent."""
    keep = (one >= 0) & (other >= 0)
    together = np.unique(one[keep] * (other.max() + 1) + other[keep], return_counts=True)[1]
    pairs = [np.bincount(batches[keep]) for batches in (one, other)]
    expected = np.prod([(sizes * (sizes - 1) / 2).sum() for sizes in pairs]) / (keep.sum() * (keep.sum() - 1) / 2)
    return float((together * (together - 1) / 2).sum() / expected)


def summarise(
    epochs: Iterator[np.ndarray], labels: np.ndarray, true: list[Mixing], batch_cells: int, sizes: np.ndarray | None
) -> dict[str, float | None]:
    """The numbers of a row. `sizes`: cells of each extent."""
    drawn = [batch_numbers(cells, batch_cells) for cells in itertools.islice(epochs, EPOCHS)]
    mixed = [mixing(batches, labels) for batches in drawn]
    entropies, expected = (np.concatenate([epoch.entropies for epoch in some]) for some in (mixed, true))
    chi_squares = np.array([epoch.chi_square for epoch in true])
    same_extent = None
    if sizes is not None:
        extents = label_table(drawn[0], np.repeat(np.arange(len(sizes)), sizes))
        same_extent = float(extents.max(1).mean() / batch_cells)
    return {
        "entropy_bits": float(entropies.mean()),
        "entropy_bits_p5": float(np.percentile(entropies, 5)),
        "entropy_ratio": float(entropies.mean() / expected.mean()),
        "same_extent_share": same_extent,
        "chi_square_ratio": float(mixed[0].chi_square / chi_squares.mean()),
        "chi_square_z": float((mixed[0].chi_square - chi_squares.mean()) / chi_squares.std(ddof=1)),
        "repeated_pairs": repeated_pairs(*drawn),
    }


def measure(options: RandomnessOptions) -> list[dict]:
    """A row for each order on the disk and way of drawing."""
    disks = make_disks(options)
    rows = []

    def add(disk: str, drawn_by: str, epochs: Iterator[np.ndarray], lanes=None, megabytes=None, sizes=None) -> None:
        labels = disks[disk].labels
        rows.append({
            "disk": disk, "drawn_by": drawn_by, "lanes": lanes, "extent_megabytes": megabytes,
            **summarise(epochs, labels, true[disk], options.batch_cells, sizes),
            "extents": None if sizes is None else len(sizes),
            "settings": {
                "inputs": [file.name for file in options.inputs], "label": options.label, "labels": int(labels.max() + 1),
                "cells": len(labels), "batch_cells": options.batch_cells, "parts": options.parts, "seed": options.seed,
            },
        })

    true = {}
    for name, (labels, _) in disks.items():
        shuffles = itertools.islice(true_epochs(len(labels), options.seed + 1), TRUE_SHUFFLES)
        true[name] = [mixing(batch_numbers(cells, options.batch_cells), labels) for cells in shuffles]
    add("shuffled", "true", true_epochs(len(disks["shuffled"].labels), options.seed))
    for name, disk in disks.items():
        for block, blocks in BLOCKS:
            add(name, f"blocks {block} x {blocks}", block_epochs(len(disk.labels), block, blocks, options.seed))
        for megabytes, lanes in itertools.product(options.extent_megabytes, options.lanes):
            sizes = disk.extent_sizes(megabytes)
            add(name, "scbench", scbench_epochs(sizes, lanes, options.seed), lanes, megabytes, sizes)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Entropy over lanes, a panel for each order on the disk."""
    from matplotlib.figure import Figure

    from scbench.evaluation.plots import COLOURS, save

    disks = list(dict.fromkeys(row["disk"] for row in rows))
    figure = Figure(figsize=(4 * len(disks), 4), layout="constrained")
    settings = rows[0]["settings"]
    figure.suptitle(f"{settings['labels']} labels, {settings['cells']:,} cells that came sorted, "
                    f"batches of {settings['batch_cells']}")
    titles = {"shuffled": "prepare's global shuffle", "parts": f"shuffled within {settings['parts']} parts",
              "sorted": "not shuffled"}
    for axes, disk in zip(figure.subplots(1, len(disks), sharey=True), disks, strict=True):
        mine = [row for row in rows if row["disk"] == disk]
        sizes = dict.fromkeys(row["extent_megabytes"] for row in mine if row["lanes"])
        for colour, megabytes in zip(COLOURS, sizes, strict=False):
            points = [(row["lanes"], row["entropy_ratio"]) for row in mine if row["extent_megabytes"] == megabytes]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"scbench, extents of {megabytes:g} MB")
        blocks = [row for row in mine if row["drawn_by"].startswith("blocks")]
        for colour, row in zip(COLOURS[::-1], blocks, strict=False):
            axes.axhline(row["entropy_ratio"], color=colour, linestyle="--", linewidth=1, label=row["drawn_by"])
        axes.set(title=titles[disk], xlabel="lanes", xscale="log", ylim=(-0.03, 1.05))
        ticks = sorted({row["lanes"] for row in mine if row["lanes"]})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("entropy of a batch's labels, true shuffle = 1")
    figure.axes[-1].legend(loc="lower right", fontsize="small")
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write, draw."""
    options = tyro.cli(RandomnessOptions, args=arguments, description=__doc__)
    rows = measure(options)
    print_table(["disk", "drawn by", "lanes", "MB", "extents", "bits", "5 %", "ratio", "one extent", "chi2", "z", "pairs"], [
        [row["disk"], row["drawn_by"], *("" if row[name] is None else f"{row[name]:g}" for name in (*IDENTITY[2:], "extents")),
         f"{row['entropy_bits']:.3f}", f"{row['entropy_bits_p5']:.3f}", f"{row['entropy_ratio']:.4f}",
         "" if row["same_extent_share"] is None else f"{row['same_extent_share']:.0%}",
         f"{row['chi_square_ratio']:.3f}", f"{row['chi_square_z']:.1f}", f"{row['repeated_pairs']:.2f}"] for row in rows
    ])
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"randomness.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
