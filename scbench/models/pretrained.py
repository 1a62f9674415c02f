"""The model directory: what others need to load a model, and to know what it was trained on.

    model.safetensors     fp32 weights
    config.json           ModelConfig, and the provenance (store, sources, splits, training options)
    vocabulary.json       token → id
    training_cells.npy    sorted uint64 content hashes of the cells seen in training or used to choose (validation);
                          8 bytes a cell; what the leakage guard of the benchmarks needs
    fingerprints/         what else it needs, to know copies that were filtered or counted again: 84 bytes a cell
                          (scbench.data.training_fingerprints)
    README.md             model card
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scbench import __version__
from scbench.config import ModelConfig
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import published_directory, refuse_existing

if TYPE_CHECKING:
    from scbench.models.model import ExpressionModel

FORMAT = 1
FINGERPRINTS = "fingerprints"


def save(
    model: "ExpressionModel", directory: Path, provenance: dict, training_cells: np.ndarray | None,
    save_fingerprints: Callable[[Path], None] | None,
) -> None:
    """Write `model` to `directory` (which must not exist), published by one rename."""
    refuse_existing(directory)
    with published_directory(directory) as partial:
        weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors")
        config = {
            "format": FORMAT,
            "scbench_version": __version__,
            "model": dataclasses.asdict(model.config),
            "vocabulary_fingerprint": model.vocabulary.fingerprint,
            "provenance": provenance,
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        model.vocabulary.save(partial / "vocabulary.json")
        if training_cells is not None:
            np.save(partial / "training_cells.npy", np.sort(training_cells.astype(np.uint64)))
        if save_fingerprints is not None:
            save_fingerprints(partial / FINGERPRINTS)
        (partial / "README.md").write_text(model_card(model, provenance), encoding="utf-8")


def load(model_class: type["ExpressionModel"], directory: Path) -> "ExpressionModel":
    """Read a model directory; UserError if it is not one, is damaged, or is newer than this scbench."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a model directory (no config.json): give a run's model/ folder.")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise UserError(f"{directory} was written by a newer scbench (format {config['format']}): upgrade scbench.")
        model_config = ModelConfig(**config["model"])
        vocabulary = Vocabulary.load(directory / "vocabulary.json")
        if vocabulary.fingerprint != config["vocabulary_fingerprint"]:
            raise UserError(f"{directory / 'vocabulary.json'} is not the vocabulary that the model was trained with.")
        model = model_class(model_config, vocabulary)
        model.load_state_dict(load_file(directory / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the model in {directory} is damaged or not scbench's ({reason}): copy it again.") from error
    model.provenance = config["provenance"]
    cells = directory / "training_cells.npy"
    model.training_cells = np.load(cells, mmap_mode="r", allow_pickle=False) if cells.is_file() else None
    fingerprints = directory / FINGERPRINTS
    model.training_fingerprints = fingerprints if fingerprints.is_dir() else None
    return model.eval()


POOLED = {"cls": "the <cls> token", "avg": "mean over genes", "own": "what the structure ends in"}
PREPARED = {"log1p": "log1p inside", "bin": "quantile bins inside"}


def model_card(model: "ExpressionModel", provenance: dict) -> str:
    """README.md of a model directory."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    table = model.embedding.table.numel()
    sources = "\n".join(f"- {s['name']}: {s['cells']:,} cells" for s in provenance.get("sources", [])) or "- not recorded"
    origin = f"pretrained with scbench {__version__}"
    if "imported_from" in provenance:
        origin = f"imported by scbench {__version__} from a checkpoint of the AAAI 2025 reference implementation"
    prepared = "log1p of counts per 10,000 inside" if c.normalize == "total" else PREPARED[c.preprocess]
    many = "averaged over draws" if c.recipe == "default" else "drawn once"
    finetuned = ""
    if tuned := provenance.get("finetuning"):
        what = "the whole model, heads left out," if tuned["train"] == "all" else "nothing here but a classifier"
        finetuned = (f"\n- finetuned: {what} on the column {tuned['label']!r} of {tuned['source']['name']}; "
                     "`scbench predict` labels new cells")
    return f"""---
library_name: scbench
tags: [single-cell, transcriptomics]
---

# {c.structure}, {c.layers} layers × width {c.width}

A model of single-cell transcriptomes, {origin}, to predict masked expression
values{" from the other genes of a cell" if c.regression else ""}{" and" if c.regression and c.mvc else ""}{
    " from a cell's embedding (MVC)" if c.mvc else ""}.

- recipe {c.recipe}; {parameters:,} parameters, {parameters - table:,} without the gene table ({c.vocabulary_size:,} tokens)
- input: raw counts ({prepared}), at most {c.max_genes} genes a cell at once; longer cells are sampled, {many}
- cell embedding: {POOLED[c.pooling]}, {c.width} numbers
- trained for {provenance.get("steps", "?")} steps of {provenance.get("batch_cells", "?")} cells{finetuned}

Trained on (training, validation and test splits together; config.json has the split counts):

{sources}

```python
import scbench
model = scbench.ExpressionModel.from_pretrained("path/to/this/folder")
adata.obsm["X_scbench"] = model.embed(adata)
```

Not validated for clinical use. What the embedding is worth beside simple baselines: `scbench benchmark classification`.
"""
