"""The tasks of prepare's two passes, and what the first one found out about each source."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from scbench.data.fingerprint_genes import gene_list
from scbench.data.gather import GatherTask
from scbench.data.gene_identity import check_matched
from scbench.data.plan import Plan, or_skip, skipped_input
from scbench.data.runs import Run
from scbench.data.scatter import ScatterTask
from scbench.data.shard_format import genes_dtype
from scbench.data.splits import group_id, split_groups
from scbench.errors import UserError


def scatter_tasks(plan: Plan, work: Path) -> list[ScatterTask]:
    """The first pass: ranges of cells of each source."""
    first_sets = np.cumsum([0, *(len(source.measured) for source in plan.sources)])
    tasks = []
    for number, start, stop in plan.ranges:
        source = plan.sources[number]
        tasks.append(ScatterTask(
            part=work / "runs" / f"{len(tasks):05d}",
            source=source.options,
            gene_map=source.gene_map,
            start=start,
            stop=stop,
            min_genes=plan.config.min_genes,
            seed=plan.config.seed,
            buckets=plan.buckets,
            genes_dtype=genes_dtype(plan.vocabulary.size),
            obs_columns=plan.obs_columns,
            skip_bad=plan.config.skip_bad_sources,
            split_by=plan.config.split_by,
            first_set=int(first_sets[number]),
            datasets=source.datasets,
        ))
    return tasks


def without_bad_sources(
    plan: Plan, tasks: Sequence[ScatterTask], scattered: Sequence[dict]
) -> tuple[Plan, list[ScatterTask], list[dict]]:
    """Leave out the inputs, and datasets of a census, that the first pass found bad, with all their cells; UserError instead
    unless that was asked for.

    The vocabulary, the number of buckets and the sets of measured genes stay as they were planned.
    """
    problems = {}
    bad_sets: dict[int, str] = {}
    for result in scattered:
        bad_sets = {int(measured): reason for measured, reason in result.get("bad", {}).items()} | bad_sets
    if bad_sets and not plan.config.skip_bad_sources:  # found by an earlier run that was asked to skip
        raise or_skip(UserError(next(iter(bad_sets.values()))), plan.others)
    datasets = [(source, dataset) for source in plan.sources for dataset in source.datasets or ("",)]
    skipped = [
        skipped_input(f"{datasets[measured][0].name}, dataset {datasets[measured][1]}", datasets[measured][0].options, reason)
        for measured, reason in sorted(bad_sets.items())
    ]
    plan = replace(plan, bad_sets=frozenset(bad_sets))
    for source in plan.sources:
        mine = [result for task, result in zip(tasks, scattered, strict=True) if task.source == source.options]
        try:
            for result in mine:
                if "problem" in result:
                    raise UserError(result["problem"])
            facts = good_sets(plan, mine)
            if bad_sets and mine and not facts:
                raise UserError(f"all datasets of {source.name} are bad: {next(iter(bad_sets.values()))}")
            check_matched(source.gene_map, *(sum(fact[name] for fact in facts) for name in ("counts_matched", "counts")))
        except UserError as error:
            if not plan.config.skip_bad_sources:
                raise or_skip(error, plan.others) from None
            problems[source.options] = skipped_input(source.name, source.options, error)
    good = [source for source in plan.sources if source.options not in problems]
    if not good:
        raise UserError(f"no input is left, because all are bad: {next(iter(problems.values()))['reason']}")
    kept = [(task, result) for task, result in zip(tasks, scattered, strict=True) if task.source not in problems]
    plan = replace(plan, bad=frozenset(problems), skipped=(*plan.skipped, *skipped, *problems.values()))
    return plan, [task for task, _ in kept], [result for _, result in kept]


def good_sets(plan: Plan, scattered: Sequence[dict]) -> list[dict]:
    """What tasks found out about each set of measured genes, without the sets of bad datasets."""
    return [facts for result in scattered for measured, facts in result["sets"].items() if int(measured) not in plan.bad_sets]


def source_facts(plan: Plan, tasks: Sequence[ScatterTask], scattered: Sequence[dict]) -> dict[int, dict]:
    """The manifest's provenance of each source by its number, as far as the first pass knows it."""
    facts = {}
    for number, source in enumerate(plan.sources):
        if source.options in plan.bad:
            continue
        ours = [(task, result) for task, result in zip(tasks, scattered, strict=True) if task.source == source.options]
        mine = good_sets(plan, [result for _, result in ours])
        cells = sum(task.stop - task.start for task, _ in ours)
        facts[number] = {
            "name": source.name,
            "kind": source.kind,
            "sha256": source.sha256,
            "licence": source.licence,
            "layer": source.options.layer,
            "organism": source.gene_map.organism,
            "genes": source.gene_map.n_genes,
            "genes_matched": source.gene_map.matched_genes,
            "merged_columns": source.gene_map.merged_columns,
            "counts": sum(fact["counts"] for fact in mine),
            "counts_matched": sum(fact["counts_matched"] for fact in mine),
            "recovered_counts": source.recovered_counts,
            "inexact_counts": sum(fact["inexact_counts"] for fact in mine),
            "fractional_values": sum(fact["fractional_values"] for fact in mine),
            "fractional_distance": max((fact["fractional_distance"] for fact in mine), default=0),
            "cells": cells,
            "dropped": {
                **({"bad_datasets": cells - sum(fact["cells"] for fact in mine)} if source.datasets else {}),
                "below_min_genes": sum(fact["below_min_genes"] for fact in mine),
            },
            **source.provenance,
        }
    if not plan.one_of_parts and all(fact["cells"] == sum(fact["dropped"].values()) for fact in facts.values()):
        cells = sum(fact["cells"] for fact in facts.values())
        raise UserError(f"no cell is left: all {cells} have fewer than {plan.config.min_genes} expressed genes (--min-genes).")
    return facts


def gather_tasks(
    plan: Plan, shares: tuple[float, float, float], tasks: Sequence[ScatterTask], scattered: Sequence[dict], work: Path
) -> list[GatherTask]:
    """The second pass: the buckets of the shuffle."""
    split_of_group = None
    if plan.config.split_by:
        sizes = plan.groups  # what every part knows
        if not plan.one_of_parts:
            sizes = Counter()
            for facts in good_sets(plan, scattered):
                sizes.update({tuple(group): cells for group, cells in facts["groups"]})
        splits = split_groups(sizes, shares, plan.config.seed)
        split_of_group = {group_id(group): split for group, split in splits.items()}
    number = {source.options: i for i, source in enumerate(plan.sources)}
    runs = tuple(
        Run(stem=task.part / f"run-{i}", source=number[task.source], genes=task.genes_dtype, counts=run["counts"])
        for task, result in zip(tasks, scattered, strict=True)
        for i, run in enumerate(result["runs"])
    )
    common = GatherTask(
        part=work, bucket=0, runs=runs, sources=tuple(source.name for source in plan.sources), seed=plan.config.seed,
        shares=shares, split_of_group=split_of_group, one_of_parts=plan.one_of_parts, bad_sets=tuple(sorted(plan.bad_sets)),
        vocabulary_size=plan.vocabulary.size,
        totals="float64" if any(isinstance(facts["counts"], float) for facts in good_sets(plan, scattered)) else "int64",
        fingerprint_genes=gene_list(plan.vocabulary),
    )
    return [replace(common, part=work / "shards" / f"{bucket:05d}", bucket=bucket) for bucket in range(plan.buckets)]
