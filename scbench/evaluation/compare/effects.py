"""What each varied option does: paired differences in every setting of the others, and whether they point one way."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from scbench.config import CompareConfig
from scbench.evaluation.compare.plan import Row, levels_of
from scbench.evaluation.report import Column, Table

METRICS = {  # name for people, and the sign of what is better (0: neither)
    "mvc_loss": ("MVC loss", -1),
    "regression_loss": ("regression loss", -1),
    "knn_accuracy": ("k-NN accuracy", 1),
    "linear_accuracy": ("linear accuracy", 1),
    "depth_r2": ("depth R²", 0),
}
ALL_SETTINGS = "all settings"


class Estimate(NamedTuple):
    """The mean over seeds and its 95 % interval (Student's t; None for a single seed)."""

    mean: float
    low: float | None
    high: float | None

    def fields(self, name: str) -> dict[str, float | None]:
        """As the fields of a row."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


NOTHING = Estimate(None, None, None)


def estimate(values: list[float]) -> Estimate:
    """The mean of values that differ by their seed, with its interval."""
    if not values:
        return NOTHING
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, None, None)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


class EstimateColumn(Column):
    """A mean, and half its interval where it has one. `fields`: the mean's alone."""

    def text(self, row: dict) -> str:
        """What the cell shows."""
        name = self.fields[0]
        if row[name] is None:
            return "–"
        if row[f"{name}_low"] is None:
            return self.pattern.format(row[name])
        return f"{self.pattern.format(row[name])} ± {self.pattern.format((row[f'{name}_high'] - row[f'{name}_low']) / 2)}"


def effects(config: CompareConfig, measured: list[tuple[Row, list[dict]]]) -> list[dict]:
    """One row for each factor, level other than the first, setting of the other factors, and metric.

    `measured`: the rows and the results of their runs. A difference is the level's value minus the first level's, run by
    run of one seed; settings that have only one of the two are left out. "all settings" averages them seed by seed.
    """
    runs = {tuple(row.levels.items()): {run["seed"]: run for run in results} for row, results in measured}
    found = []
    for factor in config.factors():
        first, *others = [level for level, _ in levels_of(config, factor)]
        for level in others:
            for metric, (_, sign) in METRICS.items():
                settings = {}
                for row, results in measured:
                    before = runs.get(tuple({**row.levels, factor: first}.items()), {})
                    if row.levels[factor] == level:
                        differences = _differences(before, {run["seed"]: run for run in results}, metric)
                        if differences:
                            settings[_setting(row, factor)] = differences
                if not settings:
                    continue
                seeds = set.intersection(*(set(differences) for differences in settings.values()))
                overall = {seed: float(np.mean([d[seed] for d in settings.values()])) for seed in sorted(seeds)}
                for setting, differences in {**settings, ALL_SETTINGS: overall}.items():
                    value = estimate(list(differences.values()))
                    found.append({
                        "factor": factor, "level": level, "instead_of": first, "setting": setting, "metric": metric,
                        "seeds": len(differences), **value.fields("difference"), "verdict": _verdict(value, sign),
                    })
    return found


def _differences(before: dict[int, dict], after: dict[int, dict], metric: str) -> dict[int, float]:
    """By seed, of the runs that both have the metric."""
    return {seed: after[seed][metric] - before[seed][metric] for seed in sorted(before.keys() & after.keys())
            if before[seed][metric] is not None and after[seed][metric] is not None}


def _setting(row: Row, factor: str) -> str:
    return ", ".join(f"{name} {level}" for name, level in row.levels.items() if name != factor) or "–"


def _verdict(value: Estimate, sign: int) -> str:
    if sign == 0:
        return ""
    if value.low is None or value.low <= 0 <= value.high:
        return "unclear"
    return "helps" if sign * value.mean > 0 else "hurts"


def effects_table(config: CompareConfig, found: list[dict]) -> Table:
    """The effects as a table, summed up in sentences."""
    columns = [
        Column("option", ("factor",)), Column("change", ("instead_of", "level"), "{} → {}"), Column("setting", ("setting",)),
        Column("metric", ("metric",)), EstimateColumn("difference", ("difference",), "{:.4f}"),
        Column("verdict", ("verdict",)),
    ]
    said = [*sentences(found), "A setting counts as unclear if its 95 % interval holds 0; the intervals are not corrected for "
                               "their number: of twenty settings without any effect, one is expected to seem clear."]
    return Table(f"What each option does ({config.structure or 'transformer'})", found, columns, said, {})


def sentences(found: list[dict]) -> list[str]:
    """One sentence for each factor, level and metric: in how many settings it helps."""
    said = []
    for overall in found:
        if overall["setting"] != ALL_SETTINGS:
            continue
        name, sign = METRICS[overall["metric"]]
        identity = ("factor", "level", "metric")
        settings = [row for row in found
                    if all(row[key] == overall[key] for key in identity) and row["setting"] != ALL_SETTINGS]
        counts = ", ".join(f"{verdict} in {sum(row['verdict'] == verdict for row in settings)}"
                           for verdict in ("helps", "hurts", "unclear"))
        counts = f"{counts} of {len(settings)} settings; " if sign else ""
        interval = "" if overall["difference_low"] is None else \
            f" ({overall['difference_low']:+.4f} to {overall['difference_high']:+.4f})"
        said.append(f"{overall['factor']} {overall['level']} instead of {overall['instead_of']}, {name}: {counts}"
                    f"over all settings {overall['difference']:+.4f}{interval}.")
    return said
