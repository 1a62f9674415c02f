"""How a model stands to the best baseline of a table: one record a comparison, of the same fields in every task."""

from typing import NamedTuple

from scbench.evaluation.scores import verdict


class Comparison(NamedTuple):
    """A row of a model minus another one, in one metric, paired; with its 95 % interval, if there is one."""

    model: str
    probe: str
    baseline: str
    baseline_probe: str
    metric: str
    difference: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str | None:
        """Which is ahead; None without an interval."""
        return None if self.low is None else verdict(self.metric, self.low, self.high)

    def words(self, other: str, form: str, unit: str = "", scale: float = 1) -> str:
        """What is said of the model: "beats OTHER (+0.1, 95 % interval +0.05 to +0.15)". `form`: of the numbers × scale."""
        value, low, high = (None if number is None else f"{scale * number:{form}}" for number in self[-3:])
        if low is None:
            return f"is {value}{unit} apart from {other}, without an interval"
        return f"{self.verdict} {other} ({value}{unit}, 95 % interval {low} to {high})"

    def record(self, sentence: str | None) -> dict:
        """JSON-able; `sentence`: of the table, where it says this."""
        return {**self._asdict(), "verdict": self.verdict, "sentence": sentence}


def sentences_of(comparisons: list[dict]) -> list[str]:
    """The sentences of some records."""
    return [one["sentence"] for one in comparisons if one["sentence"] is not None]
