"""What prepare is going to do: the inputs looked at, the vocabulary, the genes of each input, and the plan's fingerprint."""

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scbench import __version__
from scbench.config import PrepareConfig
from scbench.data.fingerprint_genes import gene_list
from scbench.data.fingerprints import FORMAT_VERSION as FINGERPRINTS_FORMAT
from scbench.data.gene_identity import GeneIdentity, GeneMap, check_organisms, gene_keys, map_genes, own_genes
from scbench.data.measured import measured_tokens, pack
from scbench.data.obs import ObsColumn, list_groups, obs_columns
from scbench.data.part import Part, Range, cell_ranges, parse_part
from scbench.data.shard_format import FORMAT_VERSION
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.census_client import census_name, pinned
from scbench.data.sources.census_selection import CensusSelection, select_cells
from scbench.data.sources.inputs import SourceOptions, is_parquet, open_obs, open_source, split_inputs
from scbench.data.splits import check_group_count
from scbench.data.vocabulary import Vocabulary
from scbench.errors import RetryError, UserError
from scbench.files import sha256

TASK_CELLS = 16_384  # cells of an input that a worker reads in one part
SHARD_CELLS = 65_536  # cells of a bucket, on average: a shard of each split
STORE_COLUMNS = ("source", "measured", "original_id", "content_hash", "n_genes", "total")  # of cells.parquet
CENSUS_SPLIT = ("collection_id",)  # --split-by of a census by default: papers share nothing smaller
CENSUS_OBS = ("cell_type", "tissue_general", "assay", "disease", "donor_id", "dataset_id", "collection_id")  # --keep-obs


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input that the store is made of."""

    name: str  # as the store calls it
    sha256: str | None  # of the file or of all files of a zarr store; of a census, of its selection; None if not read
    cells: int
    options: SourceOptions
    gene_map: GeneMap
    measured: np.ndarray  # sets of tokens, packed (scbench.data.measured): one, or one of each dataset of a census
    datasets: tuple[str, ...]  # of a census, in order; () for others
    recovered_counts: dict | None
    kind: str  # h5ad, zarr, 10x_h5, parquet or census
    by_columns: bool  # the counts have to be brought into the order of rows first
    licence: str | None
    provenance: dict = field(default_factory=dict)  # more for the manifest

    def measured_facts(self) -> list[dict]:
        """What the manifest says of each set of measured genes."""
        of = [{"dataset": dataset} for dataset in self.datasets] or [{}]
        genes = np.bitwise_count(self.measured).sum(axis=1).tolist()
        return [{"source": self.name, **dataset, "genes": n} for dataset, n in zip(of, genes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of the store, but for the cells themselves."""

    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    vocabulary_given: bool
    obs_columns: tuple[ObsColumn, ...]
    config: PrepareConfig
    buckets: int
    part: Part | None  # of --part
    ranges: tuple[Range, ...]  # of cells, that are read one by one
    groups: Counter[tuple[str, ...]]  # cells of each --split-by group in obs, of all parts; empty without --split-by
    skipped: tuple[dict, ...]  # the inputs that are left out: name, sha256 (if it can be read), reason
    bad: frozenset[SourceOptions] = frozenset()  # those of `sources` that the first pass found bad
    bad_sets: frozenset[int] = frozenset()  # the same of the datasets of a census: their sets of measured genes

    @property
    def one_of_parts(self) -> bool:
        """Whether other jobs prepare the other cells of the inputs."""
        return self.part is not None and self.part.of > 1

    @property
    def others(self) -> int:
        """Inputs and datasets of a census that there are besides any one of them."""
        return sum(len(source.datasets) or 1 for source in self.sources) - 1

    @property
    def cells(self) -> int:
        """Cells to read."""
        return sum(stop - start for _, start, stop in self.ranges)

    def options(self) -> dict:
        """prepare's options that decide the store's bytes, JSON-able."""
        names = ("seed", "split", "split_by", "keep_obs", "min_genes", "layer", "genes_column", "recover_counts", "fractional")
        options = {name: getattr(self.config, name) for name in names}
        options["vocabulary"] = "given" if self.vocabulary_given else "built from the inputs"
        return json.loads(json.dumps(options))

    def fingerprint(self) -> str:
        """SHA-256 of what decides the store's bytes: two runs with the same one can use each other's finished work."""
        return _digest([self.common_fingerprint(), self.part, self.buckets, [source.sha256 for source in self.sources]])

    def common_fingerprint(self) -> str:
        """SHA-256 of what all parts of a store have in common."""
        return _digest({
            "scbench": __version__,
            "format": FORMAT_VERSION,
            "options": self.options(),
            "vocabulary": self.vocabulary.fingerprint,
            "parts": self.part and self.part.of,
            "groups": sorted(self.groups.items()),
            "obs": self.obs_columns,
            "sources": [
                (source.name, source.cells, source.options.layer, hashlib.sha256(source.gene_map.tokens).hexdigest(),
                 hashlib.sha256(source.measured).hexdigest(), source.datasets)
                for source in self.sources
            ],
            "fingerprints": (FINGERPRINTS_FORMAT, gene_list(self.vocabulary).fingerprint),
        })


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_plan(config: PrepareConfig, workers: int, work: Path) -> Plan:
    """Look at every input; `workers` threads hash the files. The chosen cells of a census are listed in the directory `work`.

    Raises
    ------
    UserError
        If an input, the vocabulary, or a column doesn't serve; then nothing is left in `work`.
    """
    files, location = split_inputs(config.inputs)
    _check_options(config, files, location)
    if location is None:
        return _make_plan(config, workers, files, None, None)
    location, selection = pinned(location), None
    try:
        selection = select_cells(
            location, work, filter=config.filter, presets=config.preset, primary_only=not config.include_duplicate_cells,
            umi_only=not config.include_read_counts,
        )
        return _make_plan(config, workers, files, location, selection)
    except BaseException as error:
        if selection is not None and not isinstance(error, RetryError):
            selection.discard()
        with contextlib.suppress(OSError):  # parts of an earlier run are there, or nothing is
            work.rmdir()
        raise


def _make_plan(
    config: PrepareConfig, workers: int, files: Sequence[Path], location: str | None, selection: CensusSelection | None
) -> Plan:
    part = None if config.part is None else parse_part(config.part)
    vocabulary = None if config.vocabulary is None else Vocabulary.load(config.vocabulary)
    names = _source_names(files) if files else []
    asked = [
        SourceOptions(
            path=path, layer=config.layer, genes_column=config.genes_column, recover_counts=config.recover_counts,
            fractional=config.fractional, vocabulary=vocabulary if is_parquet(path) else None,
        )
        for path in files
    ]
    if selection is not None:
        names.append(census_name(location))
        asked.append(SourceOptions(
            path=selection.file, layer=None, genes_column=None, recover_counts=False, fractional=config.fractional,
            vocabulary=None, census=location,
        ))
    good = _GoodInputs(skip=config.skip_bad_sources, given=len(asked))
    inputs = [looked for name, options in zip(names, asked, strict=True)
              if (looked := good.attempt(name, options, lambda name, options: _look_at(name, options, selection, part)))]
    check_organisms({looked.name: looked.identity.organism for looked in inputs})
    if vocabulary is not None:
        gene_maps = [good.attempt(looked.name, looked.options, functools.partial(_map_genes, looked.identity, vocabulary))
                     for looked in inputs]
        inputs = [looked._replace(gene_map=gene_map) for looked, gene_map in zip(inputs, gene_maps, strict=True) if gene_map]
    if not inputs:
        raise UserError(f"no input is left: {good.skipped[0]['reason'].removesuffix('.')}, and so on for all {len(asked)}.")
    names, asked = [looked.name for looked in inputs], [looked.options for looked in inputs]
    if any(options.census is not None for options in asked):
        config = _census_defaults(config, names, asked)
    cells = [looked.cells for looked in inputs]
    columns, groups = _obs_columns(config, names, asked, cells)
    ranges = cell_ranges(cells, TASK_CELLS, part)
    read = [asked[source] for source in sorted({source for source, *_ in ranges})]
    files = [options.path for options in read if options.census is None]
    with ThreadPoolExecutor(workers) as pool:
        digests = dict(zip(files, pool.map(sha256, files), strict=True))
    _refuse_copies(files, list(digests.values()))
    if vocabulary is None:
        used = Vocabulary.build({key for looked in inputs for key in gene_keys(looked.identity)} - {""})
    else:
        used = vocabulary
    sources = []
    for looked in inputs:
        options = looked.options
        gene_map = looked.gene_map or map_genes(looked.identity, used, looked.name)
        sources.append(Source(
            name=looked.name,
            sha256=digests.get(options.path) if options.census is None else selection.sha256,
            cells=looked.cells,
            options=options,
            gene_map=gene_map,
            measured=pack(measured_tokens(gene_map.tokens, used.size, looked.present)),
            datasets=() if options.census is None else selection.datasets,
            recovered_counts=_recovered(options) if part and options in read else looked.recovered,
            kind=looked.kind,
            by_columns=looked.by_columns,
            licence=looked.licence or config.licence,
            provenance={} if options.census is None else {"census": selection.provenance},
        ))
    return Plan(
        sources=tuple(sources), vocabulary=used, vocabulary_given=vocabulary is not None, obs_columns=columns, config=config,
        buckets=-(-sum(stop - start for _, start, stop in ranges) // SHARD_CELLS), part=part, ranges=ranges, groups=groups,
        skipped=tuple(good.skipped),
    )


class _Looked(NamedTuple):
    """What one look at an input says of it."""

    name: str
    options: SourceOptions
    cells: int
    identity: GeneIdentity
    recovered: dict | None
    present: np.ndarray | None  # of a census: which genes each dataset measured
    kind: str
    by_columns: bool
    licence: str | None
    gene_map: GeneMap | None = None


def _look_at(name: str, options: SourceOptions, selection: CensusSelection | None, part: Part | None) -> _Looked:
    with open_source(options) as source:
        present = None if options.census is None else source.present(selection.datasets)
        recovered = None if part else source.recovered  # reads all of the input if there is anything to recover
        return _Looked(name, replace(options, layer=source.layer), source.n_cells, source.identity, recovered, present,
                       source.kind, isinstance(source, AnnDataSource) and source.by_columns, source.licence)


def _recovered(options: SourceOptions) -> dict | None:
    """What counts are recovered of an input that a part has cells of."""
    with open_source(options) as source:
        return source.recovered


def _map_genes(identity: GeneIdentity, vocabulary: Vocabulary, name: str, options: SourceOptions) -> GeneMap:
    return own_genes(vocabulary, name) if is_parquet(options.path) else map_genes(identity, vocabulary, name)


class _GoodInputs:
    """Tells good inputs from bad ones, which are left out if `skip`; else the first is an error. `given`: all of them."""

    def __init__(self, *, skip: bool, given: int):
        self.skipped: list[dict] = []
        self._skip, self._given = skip, given

    def attempt(self, name: str, options: SourceOptions, function: Callable) -> object | None:
        """`function(name, options)`; None if the input is bad."""
        try:
            return function(name, options)
        except RetryError:
            raise
        except UserError as error:
            if not self._skip:
                raise or_skip(error, self._given - 1) from error
            self.skipped.append(skipped_input(name, options, error))
            return None


def skipped_input(name: str, options: SourceOptions, reason: UserError | str) -> dict:
    """What the manifest says of an input that is left out; its SHA-256 if it can be read."""
    try:
        digest = None if options.census else sha256(options.path)
    except OSError:
        digest = None
    return {"name": name, "sha256": digest, "reason": str(reason)}


def or_skip(error: UserError, others: int) -> UserError:
    """What is wrong with an input, or a dataset of a census, with the option that goes on without it if there are others."""
    if not others:
        return error
    return UserError(f"{str(error).removesuffix('.')}; to go on without it, give --skip-bad-sources.")


def _check_options(config: PrepareConfig, paths: Sequence[Path], location: str | None) -> None:
    """Raise UserError if a parquet file has no vocabulary, or an option is about inputs of a kind that is not there."""
    if config.part is not None and config.vocabulary is None:
        raise UserError("--part needs --vocabulary: all parts have one vocabulary, and none of them reads all inputs.")
    if config.part is not None and config.skip_bad_sources:
        raise UserError("--part and --skip-bad-sources don't go together, because a part doesn't know what is bad in others.")
    parquet = [path for path in paths if is_parquet(path)]
    if parquet and config.vocabulary is None:
        raise UserError(
            f"{parquet[0]} names genes by token ids, which mean nothing without the vocabulary that it was written with: "
            "give that as --vocabulary."
        )
    about_h5ad = {"--layer": config.layer, "--genes-column": config.genes_column, "--recover-counts": config.recover_counts}
    given = [option for option, value in about_h5ad.items() if value]
    if given and len(parquet) == len(paths):
        others = "parquet files" if parquet and location is None else "others"
        raise UserError(f"{given[0]} is about h5ad files, and all inputs are {others}: leave it out.")
    about_census = {"--filter": config.filter, "--preset": config.preset, "--include-read-counts": config.include_read_counts,
                    "--include-duplicate-cells": config.include_duplicate_cells}
    given = [option for option, value in about_census.items() if value]
    if given and location is None:
        raise UserError(f"{given[0]} is about a census, and no input is one: give census: or leave it out.")


def _source_names(paths: Sequence[Path]) -> list[str]:
    """What the store calls the inputs: file names, with as many folders before them as it takes to tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    repeated = next(path for i, path in enumerate(paths) if path.resolve() in resolved[:i])
    raise UserError(f"the input {repeated} is given twice: leave one out.")


def _refuse_copies(paths: Sequence[Path], digests: Sequence[str]) -> None:
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            raise UserError(f"the inputs {paths[digests.index(digest)]} and {paths[i]} are the same file: leave one out.")


def _census_defaults(config: PrepareConfig, names: Sequence[str], inputs: Sequence[SourceOptions]) -> PrepareConfig:
    """The config with the columns that a census is split by, and keeps, by default; UserError if another input lacks those."""
    columns = []
    for options in inputs:
        with contextlib.closing(open_obs(options)) as obs:
            columns.append(set(obs.columns))
    split_by = config.split_by
    if not split_by and sum(share > 0 for share in config.split_shares()) > 1:
        split_by = CENSUS_SPLIT
        for name, there in zip(names, columns, strict=True):
            if not there.issuperset(split_by):
                raise UserError(f"a census is split by {split_by[0]}, which obs of {name} lacks: choose another --split-by.")
    shared = set.intersection(*columns)
    keep = config.keep_obs or tuple(column for column in CENSUS_OBS if column in shared)
    return replace(config, split_by=split_by, keep_obs=keep)


def _obs_columns(
    config: PrepareConfig, names: Sequence[str], inputs: Sequence[SourceOptions], cells: Sequence[int]
) -> tuple[tuple[ObsColumn, ...], Counter[tuple[str, ...]]]:
    """The columns to keep, --split-by's among them, and the cells of each group of those."""
    taken = [column for column in (*config.keep_obs, *config.split_by) if column in STORE_COLUMNS]
    if taken:
        raise UserError(f"the store has a column {taken[0]!r} of its own: rename the column of obs to keep it.")
    groups: Counter[tuple[str, ...]] = Counter()
    if not config.keep_obs and not config.split_by:
        return (), groups
    sources = [(name, open_obs(options), n) for name, options, n in zip(names, inputs, cells, strict=True)]
    try:
        kept = obs_columns(sources, tuple(dict.fromkeys(config.keep_obs)), "--keep-obs")
        by = obs_columns(sources, tuple(dict.fromkeys(config.split_by)), "--split-by")
        if by:
            groups = list_groups(sources, by)
            check_group_count(len(groups), config.split_shares())
    finally:
        for _, obs, _ in sources:
            obs.close()
    return tuple(dict.fromkeys((*kept, *by))), groups
