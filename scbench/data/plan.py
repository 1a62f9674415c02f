"""What prepare is going to do: the inputs looked at, the vocabulary, the genes of each input, and the plan's fingerprint."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from scbench import __version__
from scbench.config import PrepareConfig
from scbench.data.gene_identity import GeneMap, check_organisms, gene_keys, map_genes, own_genes
from scbench.data.obs import ObsColumn, list_groups, obs_columns
from scbench.data.shard_format import FORMAT_VERSION
from scbench.data.sources.inputs import SourceOptions, is_parquet, list_files, open_obs, open_source
from scbench.data.splits import check_group_count
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import sha256

SHARD_CELLS = 65_536  # cells of a bucket, on average: a shard of each split
STORE_COLUMNS = ("source", "original_id", "content_hash", "n_genes", "total")  # of cells.parquet


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input."""

    name: str  # as the store calls it
    sha256: str
    cells: int
    options: SourceOptions
    gene_map: GeneMap
    recovered_counts: dict | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of the store, but for the cells themselves."""

    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    vocabulary_given: bool
    obs_columns: tuple[ObsColumn, ...]
    config: PrepareConfig
    buckets: int

    @property
    def cells(self) -> int:
        """Cells of all inputs."""
        return sum(source.cells for source in self.sources)

    def options(self) -> dict:
        """prepare's options that decide the store's bytes, JSON-able."""
        names = ("seed", "split", "split_by", "keep_obs", "min_genes", "layer", "genes_column", "recover_counts")
        options = {name: getattr(self.config, name) for name in names}
        options["vocabulary"] = "given" if self.vocabulary_given else "built from the inputs"
        return json.loads(json.dumps(options))

    def fingerprint(self) -> str:
        """SHA-256 of what decides the store's bytes: two runs with the same one can use each other's finished parts."""
        facts = {
            "scbench": __version__,
            "format": FORMAT_VERSION,
            "options": self.options(),
            "vocabulary": self.vocabulary.fingerprint,
            "buckets": self.buckets,
            "obs": self.obs_columns,
            "sources": [
                (source.name, source.sha256, source.options.layer, hashlib.sha256(source.gene_map.tokens).hexdigest())
                for source in self.sources
            ],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_plan(config: PrepareConfig, workers: int) -> Plan:
    """Look at every input; `workers` threads hash the files.

    Raises
    ------
    UserError
        If an input, the vocabulary, or a column doesn't serve.
    """
    paths = list_files(config.inputs)
    names = _source_names(paths)
    _check_options(config, paths)
    vocabulary = None if config.vocabulary is None else Vocabulary.load(config.vocabulary)
    facts = []
    for path in paths:
        options = SourceOptions(
            path=path, layer=config.layer, genes_column=config.genes_column, recover_counts=config.recover_counts,
            vocabulary=vocabulary if is_parquet(path) else None,
        )
        with open_source(options) as source:
            facts.append((source.n_cells, replace(options, layer=source.layer), source.identity, source.recovered))
    identities = {name: identity for name, (_, _, identity, _) in zip(names, facts, strict=True)}
    check_organisms({name: identity.organism for name, identity in identities.items()})
    columns = _obs_columns(config, names, paths, [cells for cells, *_ in facts])
    with ThreadPoolExecutor(workers) as pool:
        digests = list(pool.map(sha256, paths))
    _refuse_copies(paths, digests)
    if vocabulary is None:
        used = Vocabulary.build({key for identity in identities.values() for key in gene_keys(identity)} - {""})
    else:
        used = vocabulary
    sources = tuple(
        Source(
            name=name,
            sha256=digest,
            cells=cells,
            options=options,
            gene_map=own_genes(used, name) if is_parquet(options.path) else map_genes(identity, used, name),
            recovered_counts=recovered,
        )
        for name, digest, (cells, options, identity, recovered) in zip(names, digests, facts, strict=True)
    )
    return Plan(
        sources=sources, vocabulary=used, vocabulary_given=vocabulary is not None, obs_columns=columns, config=config,
        buckets=-(-sum(source.cells for source in sources) // SHARD_CELLS),
    )


def _check_options(config: PrepareConfig, paths: Sequence[Path]) -> None:
    """Raise UserError if a parquet file has no vocabulary, or an option is about h5ad files and there is none."""
    parquet = [path for path in paths if is_parquet(path)]
    if parquet and config.vocabulary is None:
        raise UserError(
            f"{parquet[0]} names genes by token ids, which mean nothing without the vocabulary that it was written with: "
            "give that as --vocabulary."
        )
    about_h5ad = {"--layer": config.layer, "--genes-column": config.genes_column, "--recover-counts": config.recover_counts}
    given = [option for option, value in about_h5ad.items() if value]
    if given and len(parquet) == len(paths):
        raise UserError(f"{given[0]} is about h5ad files, and all inputs are parquet files: leave it out.")


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


def _obs_columns(
    config: PrepareConfig, names: Sequence[str], paths: Sequence[Path], cells: Sequence[int]
) -> tuple[ObsColumn, ...]:
    """The columns to keep, --split-by's among them."""
    taken = [column for column in (*config.keep_obs, *config.split_by) if column in STORE_COLUMNS]
    if taken:
        raise UserError(f"the store has a column {taken[0]!r} of its own: rename the column of obs to keep it.")
    if not config.keep_obs and not config.split_by:
        return ()
    sources = [(name, open_obs(path)) for name, path in zip(names, paths, strict=True)]
    try:
        kept = obs_columns(sources, tuple(dict.fromkeys(config.keep_obs)), "--keep-obs")
        by = obs_columns(sources, tuple(dict.fromkeys(config.split_by)), "--split-by")
        if by:
            groups = list_groups([(name, obs, n) for (name, obs), n in zip(sources, cells, strict=True)], by)
            check_group_count(len(groups), config.split_shares())
    finally:
        for _, obs in sources:
            obs.close()
    return tuple(dict.fromkeys((*kept, *by)))
