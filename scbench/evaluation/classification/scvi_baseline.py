"""The scVI baseline: its latent space, learnt on the training cells of a fold. scvi-tools is an extra."""

import contextlib
import importlib.util
import logging
import warnings

import anndata
import numpy as np
import scipy.sparse

from scbench.errors import UserError
from scbench.evaluation.folds import Parts
from scbench.kernels import random
from scbench.kernels.random import Stream

BATCH_CELLS = 128
_SCVI = 31  # what a key of Stream.EVALUATION decides


def check_installed() -> None:
    """UserError if scvi-tools is not there."""
    if importlib.util.find_spec("scvi") is None:
        raise UserError("scVI needs scvi-tools, which is not installed: pip install scbench[scvi], or leave --scvi out.")


def latents(counts: scipy.sparse.csr_matrix, parts: Parts, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The latent means of training, validation and test cells, float [cells, 10], of an SCVI with the package's defaults.

    It is trained on the training cells alone, all of them, and on counts; genes that these don't express are left out.
    """
    check_installed()
    import scvi

    cells = counts.astype(np.float32)
    genes = np.flatnonzero(cells[parts.train].getnnz(axis=0))
    fitted, *others = (anndata.AnnData(cells[rows][:, genes]) for rows in parts)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        scvi.settings.seed = random.key(seed, Stream.EVALUATION, _SCVI) >> 33  # 31 bits, as its generators take
        scvi.model.SCVI.setup_anndata(fitted)
        model = scvi.model.SCVI(fitted)
        # a batch of one cell has no variance to be normalised by
        batch = next(size for size in range(BATCH_CELLS, 1, -1) if len(parts.train) % size != 1)
        model.train(train_size=1.0, batch_size=batch, enable_progress_bar=False, logger=False)
        return tuple(model.get_latent_representation(each) for each in (fitted, *others))


@contextlib.contextmanager
def _quiet():
    """Without what its trainer says of devices."""
    loggers = [logging.getLogger(name) for name in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
