"""The models of a suite: what each is called, and what its pretraining seeds are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from scbench.errors import UserError
from scbench.evaluation import external
from scbench.evaluation.entrants import Model
from scbench.files import sha256
from scbench.models.model import ExpressionModel

PLACE = "{dataset}"  # in a spec: the name of the data set


def name_models(specs: Sequence[str]) -> dict[str, list[str]]:
    """The specs of each model, by name. `specs`: [NAME=]SPEC; UserError if two models without names would share one."""
    found: dict[str, list[str]] = {}
    named: dict[str, bool] = {}
    for given in specs:
        name, equals, spec = given.partition("=")
        explicit = bool(equals) and not Path(given).exists() and not given.startswith(external.OBSM)
        if not explicit:
            name, spec = _default_name(given), given
        if not name or not spec:
            raise UserError(f"--model {given!r} is no [NAME=]SPEC: give a model, and before it, if you like, a name and '='.")
        if name in found and not (explicit and named[name]):
            raise UserError(f"two models are called {name!r} ({found[name][0]} and {spec}): give names, as NAME=SPEC.")
        if spec in found.get(name, []):
            raise UserError(f"--model {given} is given twice: give each pretraining seed of a model once.")
        found.setdefault(name, []).append(spec)
        named[name] = explicit
    return found


def _default_name(spec: str) -> str:
    """The key of obsm, or the name of the file or run."""
    if spec.startswith(external.OBSM):
        return spec.removeprefix(external.OBSM)
    path = Path(spec)
    if path.name == "model":  # run/model: what tells it from others is the run
        path = path.absolute().parent
    return path.name if path.is_dir() else path.stem


def identify(specs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What tells the models of one command from those of another: the SHA-256 of their files, or the spec."""
    return {
        name: [sha256(Path(spec)) if Path(spec).exists() else spec for spec in several] for name, several in specs.items()
    }


class SuiteModels:
    """Opens the models of a suite, ours once, others for each data set; UserError if one cannot be opened."""

    def __init__(self, specs: Mapping[str, Sequence[str]]):
        self._specs = specs
        self._ours: dict[str, ExpressionModel] = {}
        for several in specs.values():
            for spec in several:
                if PLACE not in spec:
                    self._open(spec)

    def of(self, dataset: str) -> dict[str, list[Model]]:
        """The models for the data set of that name."""
        return {
            name: [self._open(spec.replace(PLACE, dataset)) for spec in several] for name, several in self._specs.items()
        }

    def _open(self, spec: str) -> Model:
        if spec in self._ours:
            return self._ours[spec]
        model = external.open_model(spec)
        if isinstance(model, ExpressionModel):
            self._ours[spec] = model
        return model
