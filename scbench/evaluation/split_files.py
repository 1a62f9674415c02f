"""Splits in files: which cell, group or perturbation is in which fold, to be fixed, shared and checked.

A unit is known by a hash of its name alone, so that a split holds whatever the order of a file's cells, and says nothing of
donors or cells to who has not got them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.files import write_text

FORMAT = "scbench split 1"
UNITS = ("cell", "group", "perturbation", "combination", "context")
HEAD = ("task", "dataset", "label", "protocol", "folds", "unit")  # the fields beside `fold`


class Split(NamedTuple):
    """The folds of a benchmark, in each of its repetitions."""

    task: str  # classification, perturbation, …
    dataset: str
    label: str  # or the column of perturbations
    protocol: str
    folds: int
    unit: str  # what is dealt to folds: one of UNITS
    fold: dict[str, list[int]]  # a unit's hash → its fold in each repetition, 0 … folds − 1

    @classmethod
    def of(
        cls, task: str, dataset: str, label: str, protocol: str, folds: int, unit: str, names: Sequence[str], fold: np.ndarray
    ) -> "Split":
        """Of units by their names [n], distinct, and their folds, int [repetitions, n]."""
        hashed = dict(zip(map(unit_hash, names), np.asarray(fold).T.tolist(), strict=True))
        if len(hashed) != len(names):
            raise ValueError("two units of a split share a name")
        return cls(task, dataset, label, protocol, folds, unit, hashed)

    @property
    def repetitions(self) -> int:
        """How often everything is divided anew."""
        return len(next(iter(self.fold.values())))

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, over the line `task label protocol folds unit` and a line `hash fold fold …` a unit, sorted.

        The fields of a line are separated by tabs, lines end with \\n. The data set's name doesn't count: files are renamed.
        """
        head = "\t".join([self.task, self.label, self.protocol, str(self.folds), self.unit])
        lines = sorted("\t".join([unit, *map(str, folds)]) for unit, folds in self.fold.items())
        return hashlib.sha256("".join(f"{line}\n" for line in [head, *lines]).encode()).hexdigest()

    def folds_of(self, names: Iterable[str], where: str) -> np.ndarray:
        """The folds of units by their names, int64 [repetitions, n]; UserError, naming `where` they are, if one has none."""
        names = list(names)
        hashed = [unit_hash(name) for name in names]
        lacking = [name for name, one in zip(names, hashed, strict=True) if one not in self.fold]
        if lacking:
            raise UserError(f"the split of {self.dataset} has no fold for {len(lacking):,} of {len(names):,} {self.unit}s of "
                            f"{where} ({lacking[0]!r}, say): give the split file that was written for this file.")
        return np.array([self.fold[one] for one in hashed], dtype=np.int64).reshape(len(names), -1).T

    def check(self, task: str, label: str, unit: str) -> None:
        """UserError unless the split is of this task, label and unit."""
        for what, mine, asked in [("task", self.task, task), ("label", self.label, label), ("unit", self.unit, unit)]:
            if mine != asked:
                raise UserError(f"the split of {self.dataset} is of {what} {mine!r}, not {asked!r}: give another split file.")

    def write(self, path: Path) -> None:
        """Write it as JSON, a unit a line, in the order of their hashes."""
        head = {"format": FORMAT, **{field: getattr(self, field) for field in HEAD}, "sha256": self.digest}
        lines = [f"    {json.dumps(unit)}: {json.dumps(folds)}" for unit, folds in sorted(self.fold.items())]
        start = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        write_text(path, f'{start},\n  "fold": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def read_split(path: Path | str) -> Split:
    """Read a split; UserError if the file is none, or was changed since it was written."""
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the split file {path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise UserError(f"the split file {path} is no JSON: give a split.json that a benchmark wrote.") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT or not {*HEAD, "fold", "sha256"} <= held.keys():
        raise UserError(f"{path} is no split file ({FORMAT!r}): give a split.json that a benchmark wrote.")
    split = Split(*(held[field] for field in HEAD), held["fold"])
    reason = _why_broken(split)
    if reason is None and split.digest != held["sha256"]:
        reason = "its SHA-256 is another than the one it was written with"
    if reason is not None:
        raise UserError(f"the split file {path} was changed or damaged ({reason}): copy it again.")
    return split


def _why_broken(split: Split) -> str | None:
    """What is wrong with the values of a split's fields; None if nothing is."""
    if any(not isinstance(getattr(split, field), str) for field in HEAD if field != "folds") or split.unit not in UNITS:
        return "a field has no value that it may have"
    if type(split.folds) is not int or split.folds < 2:
        return f"folds is {split.folds!r}"
    if not isinstance(split.fold, dict) or not split.fold:
        return "it has no units"
    lengths = set()
    for unit, folds in split.fold.items():
        if not isinstance(folds, list) or not all(type(fold) is int and 0 <= fold < split.folds for fold in folds):
            return f"unit {unit} has the folds {folds!r}"
        lengths.add(len(folds))
    return None if len(lengths) == 1 and min(lengths) else "its units differ in repetitions"


def unit_hash(name: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a unit's name (UTF-8)."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def unit_hashes(names: Iterable[str]) -> np.ndarray:
    """The same as numbers, uint64 [names]."""
    return np.array([int(unit_hash(name), 16) for name in names], dtype=np.uint64)


def unique_ids(obs_names: Iterable[str]) -> np.ndarray:
    """Cell ids without doubles, str objects [cells]: the second cell called `name` is `name#2`, the third `name#3`, …

    A number that would give another cell's own name is passed over.
    """
    names = [str(name) for name in obs_names]
    taken, last = set(names), {}
    ids = np.empty(len(names), dtype=object)
    for place, name in enumerate(names):
        if name not in last:
            ids[place], last[name] = name, 1
            continue
        number = last[name] + 1
        while (one := f"{name}#{number}") in taken:
            number += 1
        last[name] = number
        taken.add(one)
        ids[place] = one
    return ids
