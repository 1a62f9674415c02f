"""The cells of a census that a filter chooses: their soma_joinids in a file, and what the manifest says of them."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scbench.data.sources.census_client import (
    ORGANISM,
    VERSION,
    build,
    census_name,
    datasets,
    experiment,
    open_census,
    reading,
    release_facts,
)
from scbench.data.sources.census_query import CANCERS, PAN_CANCER, UMI_ASSAYS, value_filter
from scbench.errors import UserError
from scbench.files import published_file, sha256, write_text

if TYPE_CHECKING:
    import tiledbsoma

DATASET_FACTS = ("dataset_version_id", "dataset_title", "collection_doi", "citation", "license", "licence")


@dataclass(frozen=True, kw_only=True)
class CensusSelection:
    """Cells of a census."""

    file: Path  # their soma_joinids, int64, ascending
    note: Path  # the provenance, for the next run that asks for the same
    created: bool  # the files were not there before
    provenance: dict  # JSON-able, without paths of the machine

    @property
    def datasets(self) -> tuple[str, ...]:
        """The ids of the datasets with a chosen cell, ascending."""
        return tuple(facts["dataset_id"] for facts in self.provenance["datasets"])

    def discard(self) -> None:
        """Remove the files, unless an earlier run made them."""
        if self.created:
            self.file.unlink()
            self.note.unlink()

    @property
    def sha256(self) -> str:
        """What stands for the SHA-256 of a file: of the census's own facts, the filter and the soma_joinids."""
        return hashlib.sha256(json.dumps(self.provenance).encode()).hexdigest()


def select_cells(
    location: str,
    folder: Path,
    *,
    filter: str | None,
    presets: Sequence[str],
    primary_only: bool,
    umi_only: bool,
) -> CensusSelection:
    """Ask a census for cells, in one pass over its obs that holds a few megabytes, and list them in a file of `folder`.

    A pass that was finished there before, with the same request to the same census, is not made again.

    Parameters
    ----------
    location
        A version (a date) or a URI.
    filter, presets
        As `value_filter` takes them.
    primary_only
        Leave out the copies of cells that the census has from another dataset.
    umi_only
        Leave out the cells whose assay is not in UMI_ASSAYS.

    Raises
    ------
    UserError
        If the census cannot be opened, the filter is none, or nothing matches.
    """
    query = value_filter(filter, presets, primary_only=primary_only)
    census = open_census(location)
    public = VERSION.fullmatch(location) or "://" in location.removeprefix("file:")
    facts = {"location": location if public else census_name(location), **release_facts(location), **build(census),
             "organism": ORGANISM, "value_filter": query}
    request = json.dumps([location, facts, umi_only, PAN_CANCER in presets])
    note = folder / f"selection-{hashlib.sha256(request.encode()).hexdigest()[:16]}.json"
    selection = _chosen_before(folder, note)
    if selection is None:
        folder.mkdir(parents=True, exist_ok=True)
        absent = _absent_cancers(census, location) if PAN_CANCER in presets else []
        facts |= {"cancers_without_cells": absent}
        selection = _choose(census, location, query, folder, note, facts, umi_only=umi_only)
    absent = selection.provenance["cancers_without_cells"]
    if absent:
        print(f"scbench: no cell of {census_name(location)} has the disease {', '.join(absent)} (of --preset pan-cancer).",
              file=sys.stderr)
    return selection


def _chosen_before(folder: Path, note: Path) -> CensusSelection | None:
    """What an earlier run noted, if its list of cells is still whole."""
    try:
        provenance = json.loads(note.read_text(encoding="utf-8"))
        file = _file(folder, provenance["soma_joinids_sha256"])
        if sha256(file) != provenance["soma_joinids_sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return CensusSelection(file=file, note=note, created=False, provenance=provenance)


def _file(folder: Path, digest: str) -> Path:
    """Named by content: another prepare may be reading its own there."""
    return folder / f"soma_joinids-{digest[:16]}"


def _choose(
    census: "tiledbsoma.Collection", location: str, query: str, folder: Path, note: Path, facts: dict, *, umi_only: bool
) -> CensusSelection:
    """The pass over obs; `facts` are those of the provenance that are known already."""
    obs = experiment(census).obs
    if umi_only and "assay" not in obs.schema.names:
        raise UserError(
            f"{census_name(location)} has no column assay in obs, so counts of molecules cannot be told from counts of reads: "
            "take all with --include-read-counts."
        )
    unnamed = folder / f"soma_joinids-{os.getpid()}"
    digest = hashlib.sha256()
    cells: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    last = -1
    with published_file(unnamed) as temporary, open(temporary, "wb") as file, reading(location, query):
        columns = ["soma_joinid", "dataset_id", *(["assay"] if umi_only else [])]
        for table in obs.read(column_names=columns, value_filter=query or None, result_order="row-major"):
            if umi_only:
                kept = pc.is_in(as_strings(table["assay"]), pa.array(sorted(UMI_ASSAYS)))
                left_out.update(_tally(table.filter(pc.invert(kept))["assay"]))
                table = table.filter(kept)
            joinids = table["soma_joinid"].to_numpy().astype("<i8")
            if len(joinids) == 0:
                continue
            if joinids[0] <= last or (np.diff(joinids) <= 0).any():
                raise UserError(f"the census {location} is broken: its soma_joinids do not ascend.")
            last = int(joinids[-1])
            cells.update(_tally(table["dataset_id"]))
            file.write(joinids)
            digest.update(joinids)
    if not cells:
        unnamed.unlink()
        raise UserError(_nothing(location, query, left_out))
    provenance = {
        **facts,
        "assays_left_out": dict(sorted(left_out.items())),
        "cells": sum(cells.values()),
        "soma_joinids_sha256": digest.hexdigest(),
        "datasets": _dataset_facts(census, location, cells),
    }
    named = _file(folder, digest.hexdigest())
    os.replace(unnamed, named)
    write_text(note, json.dumps(provenance))
    return CensusSelection(file=named, note=note, created=True, provenance=provenance)


def as_strings(column: pa.ChunkedArray) -> pa.Array:
    """A column of obs, a dictionary or not, as strings."""
    return column.cast(pa.string()).combine_chunks()


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(item["values"]): item["counts"] for item in pc.value_counts(as_strings(column)).to_pylist()}


def _absent_cancers(census: "tiledbsoma.Collection", location: str) -> list[str]:
    """The labels of the pan-cancer query that no cell of this census has."""
    found: set[str] = set()
    query = f"disease in {list(CANCERS)}"
    with reading(location, query):
        for table in experiment(census).obs.read(column_names=["disease"], value_filter=query):
            found.update(_tally(table["disease"]))
    return [label for label in CANCERS if label not in found]


def _nothing(location: str, query: str, left_out: Counter[str]) -> str:
    if left_out:
        return (f"all {sum(left_out.values()):,} cells of {census_name(location)} that match {query} come from assays that "
                f"are not known to count molecules ({', '.join(sorted(left_out))}): take them with --include-read-counts, or "
                "widen --filter.")
    return f"no cell of {census_name(location)} matches {query or 'an empty filter'}: widen --filter or --preset."


def _dataset_facts(census: "tiledbsoma.Collection", location: str, cells: Counter[str]) -> list[dict]:
    """What the manifest says of each dataset with a chosen cell, in the order of their ids."""
    with reading(location):
        rows = {row["dataset_id"]: row for row in datasets(census).to_dict("records")}
    facts = []
    for dataset in sorted(cells):
        row = rows.get(dataset, {})
        said = {name: str(row[name]) for name in ("collection_id", *DATASET_FACTS) if row.get(name)}
        facts.append({"dataset_id": dataset, **said, "cells": cells[dataset]})
    return facts
