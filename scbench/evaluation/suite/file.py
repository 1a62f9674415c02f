"""Suite files: TOML that names data sets, what is predicted of each, and where each comes from.

    title = "…"                 what tables call it
    seeds = 3                   repetitions and folds of the default protocols
    folds = 5

    [[dataset]]                 one or more
    name = "pbmc3k"             of its folder and rows
    task = "classification"     or perturbation, counts
    path = "pbmc3k.h5ad"        or several: the first that is there is used
    …                           the options of the task's own verb: see KEYS

Every key is checked: a suite that is read can be run, as far as that can be known without its data.
"""

import hashlib
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import NamedTuple, get_args

from scbench.config import Values
from scbench.config.perturbation import Split, check_predictor
from scbench.errors import UserError
from scbench.evaluation.classification.label_flags import ORIGINS

CLASSIFICATION, PERTURBATION, COUNTS = TASKS = ("classification", "perturbation", "counts")
DEFAULT, AAAI2025 = PROTOCOLS = ("default", "aaai2025")
UNKNOWN = "unknown"
SEEN, UNSEEN = "unseen-cells", "unseen-perturbation"  # the split that the protocol aaai2025 has if none is said, and default

TEXT, TEXTS = "text", "text, or a list of texts"
KEYS: dict[str, tuple[object, tuple[str, ...]]] = {  # key → what it may be, and the tasks that have it
    "name": (TEXT, TASKS),
    "task": (TASKS, TASKS),
    "path": (TEXTS, TASKS),
    "layer": (TEXT, TASKS),
    "genes_column": (TEXT, TASKS),
    "values": (get_args(Values), TASKS),
    "source": (TEXT, TASKS),  # where the data come from
    "note": (TEXT, TASKS),  # how to put them in place, and what else to know
    "protocol": (PROTOCOLS, (CLASSIFICATION, PERTURBATION)),
    "split_file": (TEXT, TASKS),
    "label": (TEXT, (CLASSIFICATION,)),
    "label_origin": (tuple(ORIGINS), (CLASSIFICATION,)),
    "group": (TEXT, (CLASSIFICATION, COUNTS)),
    "perturbation_column": (TEXT, (PERTURBATION,)),
    "control": (TEXT, (PERTURBATION,)),
    "context": (TEXTS, (PERTURBATION,)),
    "study": (TEXTS, (PERTURBATION,)),
    "total_counts_column": (TEXT, (PERTURBATION,)),
    "split": (get_args(Split), (PERTURBATION,)),
    "predictor": (("ridge", "context"), (PERTURBATION,)),
}


class DataSet(NamedTuple):
    """One entry of a suite. None, or empty: not said."""

    name: str
    task: str
    path: tuple[str, ...]  # relative ones are in the folder of the suite's data
    layer: str | None = None
    genes_column: str | None = None
    values: str = "counts"
    source: str = UNKNOWN
    note: str = ""
    protocol: str = DEFAULT
    split_file: str | None = None
    label: str | None = None
    label_origin: str = UNKNOWN
    group: str | None = None
    perturbation_column: str | None = None
    control: str | None = None
    context: tuple[str, ...] = ()
    study: tuple[str, ...] | None = None
    total_counts_column: str | None = None
    split: str | None = None  # of perturbations, always said
    predictor: str = "ridge"


class Suite(NamedTuple):
    """What a suite file says."""

    title: str
    datasets: tuple[DataSet, ...]
    seeds: int
    folds: int
    folder: Path  # where relative paths start
    sha256: str  # of the file


def shipped() -> list[str]:
    """The names of the suites that come with scbench."""
    files = resources.files("scbench.suites").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_suite(suite: Path | str) -> Suite:
    """Read a suite file, or the shipped suite of that name; UserError if it isn't one.

    Relative paths start in the file's folder, of a shipped suite in the present one.
    """
    if str(suite) in shipped():
        content, folder = (resources.files("scbench.suites") / f"{suite}.toml").read_bytes(), Path()
    else:
        path = Path(suite)
        try:
            content, folder = path.read_bytes(), path.parent
        except OSError as error:
            raise UserError(f"the suite {suite} cannot be read ({error.strerror or error}): give a TOML file, or one of the "
                            f"suites that come with scbench: {', '.join(shipped())}.") from None
    try:
        held = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the suite {suite} is no TOML ({str(error).rstrip('.')}): mend it.") from None
    if unknown := held.keys() - {"title", "seeds", "folds", "dataset"}:
        raise UserError(f"{suite}: unknown key {min(unknown)!r}: a suite has title, seeds, folds and [[dataset]].")
    entries = held.get("dataset")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{suite} names no data set: give one or more [[dataset]].")
    title = held.get("title", Path(suite).stem)
    _check(title, TEXT, "title", str(suite))
    numbers = {}
    for key, default, least in [("seeds", 3, 1), ("folds", 5, 3)]:
        numbers[key] = held.get(key, default)
        if type(numbers[key]) is not int or numbers[key] < least:
            raise UserError(f"{suite}: {key} is {numbers[key]!r}: give a whole number of at least {least}.")
    datasets = tuple(_dataset(entry, number, str(suite)) for number, entry in enumerate(entries, 1))
    places = [(one.task, one.name.lower()) for one in datasets]  # some file systems ignore case
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{suite}: two data sets of task {place[0]} are called {datasets[number].name!r}: name each once.")
    return Suite(title, datasets, numbers["seeds"], numbers["folds"], folder, hashlib.sha256(content).hexdigest())


def _dataset(entry: dict, number: int, suite: str) -> DataSet:
    """One [[dataset]], every key of it checked."""
    where = f"{suite}, data set {number}" + (f" ({entry['name']})" if isinstance(entry.get("name"), str) else "")
    for key in ("name", "task", "path"):
        if key not in entry:
            raise UserError(f"{where} has no {key}: give its name, task and path.")
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}: choose among {', '.join(KEYS)}.")
        _check(value, KEYS[key][0], key, where)
    task = entry["task"]
    for key in entry:
        if task not in KEYS[key][1]:
            raise UserError(f"{where}: {key} is no part of the task {task}: leave it out.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry["name"]):
        raise UserError(f"{where}: the name is that of a folder too: use letters, digits, '.', '_' and '-'.")
    lists = {key: (value,) if isinstance(value, str) else tuple(value)
             for key, value in entry.items() if KEYS[key][0] == TEXTS}
    dataset = DataSet(**{**entry, **lists})
    if task == PERTURBATION and dataset.split is None:
        dataset = dataset._replace(split=SEEN if dataset.protocol == AAAI2025 else UNSEEN)
    _check_task(dataset, where)
    return dataset


def _check(value: object, kind: object, key: str, where: str) -> None:
    """UserError unless a key's value is of its kind."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise UserError(f"{where}: {key} is {value!r}: choose among {', '.join(kind)}.")
        return
    texts = value if kind == TEXTS and isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: {key} is {value!r}: give {kind}.")


def _check_task(dataset: DataSet, where: str) -> None:
    """UserError unless the keys say what the task needs, and go together."""
    of_reference = [path.lower().endswith(".pt") for path in dataset.path]
    if dataset.task == CLASSIFICATION:
        if dataset.label is None and not all(of_reference):
            raise UserError(f"{where} has no label: name the column of obs to predict, or say {UNKNOWN!r}.")
        if dataset.protocol == AAAI2025:
            _refuse(dataset, ("group", "split_file"), where)
    elif dataset.task == PERTURBATION:
        if not all(of_reference) and (dataset.perturbation_column is None or dataset.control is None):
            raise UserError(f"{where} has no perturbation_column or no control: name the column of obs that holds each cell's "
                            f"perturbation and what it calls controls, or say {UNKNOWN!r}.")
        if dataset.protocol == AAAI2025:
            _refuse(dataset, ("context", "study", "total_counts_column", "split_file"), where)
            if dataset.split not in (SEEN, UNSEEN) or dataset.predictor != "ridge":
                raise UserError(f"{where}: the protocol {AAAI2025} splits by {SEEN} (its default) or {UNSEEN}, and has no "
                                "predictor: mend or leave these out.")
            return
        try:
            check_predictor(dataset.predictor, dataset.split, dataset.context)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _refuse(dataset: DataSet, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if getattr(dataset, key):
            raise UserError(f"{where}: {key} is no part of the protocol {AAAI2025}: leave it out.")
