"""Tables of results: one directory with results.json, results.csv and results.md, and the same on the screen."""

import csv
import io
import json
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from scbench import __version__
from scbench.evaluation.forest import forest_plot
from scbench.files import published_directory


class Column(NamedTuple):
    """One column of the table that people read. Several fields of a row may be shown in one cell."""

    title: str
    fields: tuple[str, ...]
    pattern: str = "{}"  # format of the fields

    def text(self, row: dict) -> str:
        """What the cell shows: a dash where the row has no value."""
        values = [row[field] for field in self.fields]
        return "–" if any(value is None for value in values) else self.pattern.format(*values)


class IntervalColumn(Column):
    """One field with its 95 % interval, where it has one; `pattern` formats each number."""

    def text(self, row: dict) -> str:
        (name,) = self.fields
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        if row[name] is None or low is None:
            return super().text(row)
        return f"{super().text(row)} ({self.pattern.format(low)} to {self.pattern.format(high)})"


class Table(NamedTuple):
    """Rows of results and what is needed to read them."""

    title: str
    rows: list[dict]  # all with the same fields, in the same order; None where there is no value
    columns: list[Column]  # what people are shown of them
    sentences: list[str]  # what the table says, in plain words
    details: dict  # everything else that JSON should hold
    # other files of the directory by name: their texts, or what writes them to a path
    beside: Mapping[str, str | Callable[[Path], None]] = MappingProxyType({})
    metric: str | None = None  # the field of the rows that matters most and that forest.png shows; None: no such picture

    def record(self) -> dict:
        """The whole table as JSON-able values."""
        metric = {} if self.metric is None else {"metric": self.metric}
        return {"title": self.title, **metric, "rows": self.rows, "sentences": self.sentences, **self.details}

    def markdown(self) -> str:
        """Title, table and sentences in Markdown."""
        lines = [
            "| " + " | ".join(column.title for column in self.columns) + " |",
            "| " + " | ".join("---" for _ in self.columns) + " |",
            *("| " + " | ".join(_escape(column.text(row)) for column in self.columns) + " |" for row in self.rows),
        ]
        return "\n".join([f"# {_escape(self.title)}", "", *lines, "", *(f"- {line}" for line in self.sentences), ""])

    def csv(self) -> str:
        """All fields of all rows, empty where there is no value."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def files(self, stem: str = "results") -> dict[str, str]:
        """The texts of results.json, results.csv and results.md, by name."""
        record = json.dumps(self.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return {f"{stem}.json": record, f"{stem}.csv": self.csv(), f"{stem}.md": self.markdown()}

    def write(self, directory: Path) -> None:
        """Write results.json, results.csv, results.md, forest.png if there is a metric, and what goes beside to `directory`,
        published by one rename."""
        with published_directory(directory) as partial:
            for name, content in {**self.files(), **self.beside}.items():
                if callable(content):
                    content(partial / name)
                else:
                    (partial / name).write_text(content, encoding="utf-8")
            if self.metric is not None:
                forest_plot(self.rows, self.metric, partial / "forest.png", self.title)

    def show(self, console: Console) -> None:
        """Print the table and its sentences."""
        shown = RichTable(title=self.title, title_justify="left")
        for column in self.columns:
            shown.add_column(column.title, justify="left" if column.pattern == "{}" else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*(column.text(row) for column in self.columns))
        console.print(shown)
        for line in self.sentences:
            console.print(f"- {line}", markup=False)


def screen(quiet: bool = False, width: int = 120) -> Console:
    """Where results are shown: as wide as the terminal; in a file or a pipe `width`, enough for a table."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else width, highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def versions() -> dict[str, str]:
    """Those of the software."""
    names = ("torch", "numpy", "scipy", "scikit-learn", "anndata")
    return {"scbench": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
