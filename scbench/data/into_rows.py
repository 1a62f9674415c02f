"""Before prepare's first pass: inputs that have their counts by columns are brought into the order of rows, each once.

Otherwise every worker would stream such a file again and again. The rows stay in the work directory until the store is
published: 4 bytes and a value an entry, three times that while they are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scbench.data.parts import finished_part
from scbench.data.plan import Plan
from scbench.data.sources.anndata import bring_into_rows
from scbench.data.sources.inputs import SourceOptions
from scbench.errors import RetryError, UserError


@dataclass(frozen=True, kw_only=True)
class RowsTask:
    """Cells `start` … `stop`−1 of source number `number`, to go into the directory `part`."""

    part: Path
    number: int
    source: SourceOptions
    start: int
    stop: int
    recovering: bool
    skip_bad: bool  # leave it to the first pass to say what is wrong with the input


def rows_tasks(plan: Plan, work: Path) -> list[RowsTask]:
    """One for each source that is read and has its counts by columns."""
    tasks = []
    for number, source in enumerate(plan.sources):
        ranges = [range_ for range_ in plan.ranges if range_.source == number]
        if source.by_columns and ranges:
            tasks.append(RowsTask(
                part=work / "rows" / f"{number:05d}", number=number, source=source.options, start=ranges[0].start,
                stop=ranges[-1].stop, recovering=source.recovered_counts is not None, skip_bad=plan.config.skip_bad_sources,
            ))
    return tasks


def write_rows(task: RowsTask) -> dict:
    """Do a task. Facts: "done"."""
    return finished_part(task.part, lambda directory: _write_rows(task, directory), durable=False)


def _write_rows(task: RowsTask, directory: Path) -> dict:
    try:
        bring_into_rows(
            task.source.path, task.source.layer, task.start, task.stop, directory, recovering=task.recovering,
        )
    except RetryError:
        raise
    except UserError:
        if not task.skip_bad:
            raise
        return {"done": False}
    return {"done": True}


def with_rows(plan: Plan, tasks: Sequence[RowsTask], results: Sequence[dict]) -> Plan:
    """The plan that reads rows where `tasks` wrote them."""
    sources = list(plan.sources)
    for task, result in zip(tasks, results, strict=True):
        if result["done"]:
            sources[task.number] = replace(sources[task.number], options=replace(task.source, rows=task.part))
    return replace(plan, sources=tuple(sources))
