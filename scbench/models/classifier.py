"""The classifier in a finetuned model's directory: a linear layer on the cell embedding, and when it says nothing.

    classifier.safetensors   fp32 weights, mean and scale of the embeddings that it was started on, and where the classes lie
    classifier.json          classes, label column, temperature, both limits and their rule, metrics, digest of the split, …
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scbench.errors import UserError

FORMAT = 1
UNASSIGNED = "unassigned"
SHRINKAGE = 1e-3  # of the mean variance, added to every variance
_WEIGHTS, _ABOUT = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Logits of the classes, linear in the standardised cell embedding. It starts at 0: all classes alike."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("whitening", torch.eye(width))
        self.register_buffer("centres", torch.zeros(classes, width))  # of the classes, whitened
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """float32 [B, D] → [B, classes]."""
        return self.linear((embeddings - self.mean) / self.scale)

    def distances(self, embeddings: Tensor) -> Tensor:
        """How far each cell is from the nearest class, [B], in standard deviations within classes (Mahalanobis)."""
        whitened = (embeddings - self.mean) / self.scale @ self.whitening
        return torch.cdist(whitened, self.centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1)

    @torch.no_grad()
    def place(self, embeddings: Tensor, classes: Tensor) -> None:
        """Learn where the classes lie: their means, and one covariance within all (Lee et al., "A simple unified framework for
        detecting out-of-distribution samples", NeurIPS 2018), a little shrunk. `classes`: int64 [B], each one there."""
        states = ((embeddings - self.mean) / self.scale).double()
        sizes = torch.bincount(classes, minlength=len(self.centres))
        centres = torch.zeros_like(self.centres, dtype=torch.float64).index_add_(0, classes, states) / sizes[:, None]
        within = states - centres[classes]
        covariance = within.T @ within / len(within)
        covariance.diagonal().add_(SHRINKAGE * covariance.trace() / len(covariance) + torch.finfo(torch.float32).tiny)
        values, vectors = torch.linalg.eigh(covariance)
        whitening = vectors / values.sqrt()
        self.whitening.copy_(whitening)
        self.centres.copy_(centres @ whitening)


def save(classifier: Classifier, about: dict, directory: Path) -> None:
    """Write both files into `directory`; `about`: JSON-able, with what `load` needs."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, directory / _WEIGHTS)
    (directory / _ABOUT).write_text(
        json.dumps({"format": FORMAT, **about}, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def load(directory: Path, width: int) -> tuple[Classifier, dict]:
    """The classifier of a model of `width`, and what is known of it; UserError if there is none, or it is damaged."""
    if not (directory / _ABOUT).is_file():
        raise UserError(f"{directory} has no classifier ({_ABOUT}): make a model with one by `scbench finetune`.")
    try:
        about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise UserError(f"the classifier in {directory} has format {about['format']}, newer than this scbench reads: "
                            "upgrade scbench.")
        classifier = Classifier(width, len(about["classes"]))
        classifier.load_state_dict(load_file(directory / _WEIGHTS))
        numbers = [about[name] for name in ("temperature", "threshold", "largest_distance")]
        if not all(isinstance(number, float) for number in numbers) or not isinstance(about["model_fingerprint"], str):
            raise TypeError(f"{_ABOUT} holds other things than it should")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the classifier in {directory} is damaged or not scbench's ({reason}): copy it again.") from error
    return classifier.eval(), about
