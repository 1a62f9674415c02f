"""Fingerprints of labelled cells, so that the leakage guard can be asked about them as about pretraining's."""

import numpy as np

from scbench.data.cells import content_hash, take, to_tokens
from scbench.data.fingerprint_genes import gene_list, measured_genes
from scbench.data.fingerprints import barcode_hashes, records
from scbench.data.gene_identity import map_genes
from scbench.data.measured import measured_tokens
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.training_fingerprints import TrainingFingerprints, among
from scbench.data.vocabulary import Vocabulary
from scbench.evaluation import embed
from scbench.evaluation.progress import progress_bar


def fingerprint_cells(
    source: AnnDataSource, vocabulary: Vocabulary, hashes: np.ndarray, progress: bool
) -> TrainingFingerprints:
    """Of those cells of an open source whose content hash on `vocabulary` is among `hashes` (sorted), copies included."""
    gene_map, common = map_genes(source.identity, vocabulary, source.name), gene_list(vocabulary)
    barcodes = barcode_hashes(source.obs_names)
    found = []
    with progress_bar("fingerprints", source.n_cells, progress) as advance:
        for start, counts in embed.chunks(source):
            cells = to_tokens(counts, gene_map)
            content = content_hash(cells.genes, cells.counts, cells.offsets)
            rows = np.flatnonzero(among(hashes, content))
            chosen = take(cells, rows)
            block = records(chosen.genes, chosen.counts, np.diff(chosen.offsets), common)
            block["content"], block["barcode"] = content[rows], barcodes[start + rows]
            found.append(block)
            advance(len(content))
    block = np.concatenate(found)
    measured = measured_genes(measured_tokens(gene_map.tokens, vocabulary.size), common)
    return TrainingFingerprints(
        hashes=None, measured=measured, genes=common.fingerprint, n_cells=len(block), blocks=lambda: iter([block])
    )
