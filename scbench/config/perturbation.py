"""Options of `scbench benchmark perturbation`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from scbench.config.benchmark import BenchmarkConfig
from scbench.config.common import Output
from scbench.errors import UserError

ONLY_DEFAULT = ("context", "study", "total_counts_column", "split", "predictor", "split_file", "save_predictions", "seeds",
                "folds")  # options of the default protocol alone
Split = Literal["unseen-cells", "unseen-perturbation", "unseen-combination", "unseen-context"]


@dataclass(frozen=True, kw_only=True)
class PerturbationConfig(BenchmarkConfig):
    """Predict how perturbations change the mean expression of held-out cells, beside baselines and a ceiling."""

    fewest_folds: ClassVar[int] = 2  # strengths are chosen on groups of the training cells

    model: Positional[Path]
    """Model directory; obsm:KEY, an .npz or a .parquet of embeddings (of genes for ridge); or an h5ad of predictions."""
    input: Positional[Path]
    """h5ad file with raw counts; or, with --protocol aaai2025, the reference's processed .pt file."""
    perturbation_column: str | None = None
    """Column of obs that names each cell's perturbation: A, A+B, A_B or A,ctrl; a .pt file implies it."""
    control: str | None = None
    """What that column calls control cells; a .pt file implies it."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown), the split and the forest plot."""
    protocol: Literal["default", "aaai2025"] = "default"
    """default: changes of what is held out; aaai2025: the reference's prompts on the frozen network, 5 trials of 70/30."""
    unseen: bool = False
    """Of aaai2025: 70/30 by perturbed gene rather than by cell."""
    context: tuple[str, ...] = ()
    """Columns of obs (cell line, patient, …): changes are against the controls of the same context."""
    study: tuple[str, ...] | None = None
    """Columns of obs whose values are never mixed; by default dataset, study and perturbation_type where they are there."""
    total_counts_column: str | None = None
    """Column of obs with each cell's total over its whole profile; by default the sum over the file's genes. A file of less
    than 2,000 genes needs it, or the word panel for the sum over these, which is marked in the table."""
    split: Split = "unseen-perturbation"
    """What is held out."""
    predictor: Literal["ridge", "context"] = "ridge"
    """ridge: from the targets' gene embeddings; context: from contexts whose controls the model embeds alike."""
    save_predictions: bool = False
    """Write the model's predicted profiles of all that is held out, as predictions.h5ad."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {"--perturbation-column": self.perturbation_column, "--control": self.control}
        missing = [option for option, value in names.items() if value is None]
        if self.input.suffix.lower() == ".pt":
            if self.protocol != "aaai2025":
                raise UserError(f"{self.input} holds no whole profiles, which the default protocol needs: give --protocol "
                                "aaai2025, or an h5ad.")
            if len(missing) < 2:
                raise UserError(f"{self.input} implies --perturbation-column and --control: leave them out.")
        elif missing:
            raise UserError(f"{' and '.join(missing)} must be given for {self.input}: say which column of obs names the "
                            "perturbations, and what it calls controls.")
        if self.protocol == "aaai2025":
            self._check_prompts()
        elif self.unseen:
            raise UserError("--unseen goes with --protocol aaai2025: here --split says what is held out.")
        check_predictor(self.predictor, self.split, self.context)

    def _check_prompts(self) -> None:
        """Refuse what has no meaning for the reference's protocol."""
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in ONLY_DEFAULT if getattr(self, name) != defaults[name]]
        if changed:
            option = "--" + changed[0].replace("_", "-")
            raise UserError(f"{option} is no part of --protocol aaai2025, which has 5 trials of 70/30: leave it out.")


def check_predictor(predictor: str, split: str, context: tuple[str, ...]) -> None:
    """Raise UserError if the predictor and the split don't go together, or contexts are missing."""
    if predictor == "context" and split != "unseen-context":
        raise UserError(f"the predictor context predicts changes in an unseen context, not with --split {split}: "
                        "add --split unseen-context or choose --predictor ridge.")
    if split == "unseen-context" and not context:
        raise UserError("--split unseen-context needs the columns that make a context: give --context.")
