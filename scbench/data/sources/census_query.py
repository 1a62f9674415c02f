"""Which cells of the CELLxGENE Census: the value filter of its obs, the named presets, and the assays that count molecules."""

import ast
from collections.abc import Sequence

from scbench.errors import UserError

DEFAULT_VERSION = "2025-01-30"  # what `census:` means: a release with long-term support (LTS); the manifest has its flag

# The queries of the reference implementation, each mended so that no cell is in two of them.
TISSUES = ("heart", "blood", "brain", "lung", "kidney", "intestine", "pancreas")  # values of tissue_general
OTHERS, PAN_CANCER = "others", "pan-cancer"
PRESETS = (*TISSUES, OTHERS, PAN_CANCER)

# Labels of `disease` in the pan-cancer query: the list of scGPT (Cui et al., Nature Methods 2024).
CANCERS = (
    "malignant ovarian serous tumor", "glioblastoma", "lung adenocarcinoma", "squamous cell lung carcinoma",
    "small cell lung carcinoma", "non-small cell lung carcinoma", "B-cell non-Hodgkin lymphoma", "follicular lymphoma",
    "gastric cancer", "blastoma", "pilocytic astrocytoma", "acute myeloid leukemia", "tubular adenoma",
    "clear cell renal carcinoma", "adenocarcinoma", "tubulovillous adenoma", "colorectal cancer", "Wilms tumor",
    "acute promyelocytic leukemia", "neuroendocrine carcinoma", "chromophobe renal cell carcinoma",
)

# Values of `assay` (labels of the Experimental Factor Ontology, as the Census spells them) whose protocol puts a unique
# molecular identifier on every transcript. Compiled by hand from the protocols' descriptions; Smart-seq3 (identifiers on
# 5' reads only), STRT-seq and CEL-seq (in later versions only) and mCT-seq (full-length reads) are left out. The manifest
# lists what this left out, by assay.
UMI_ASSAYS = frozenset({
    "10x 3' transcription profiling", "10x 3' v1", "10x 3' v2", "10x 3' v3", "10x 3' v4",
    "10x 5' transcription profiling", "10x 5' v1", "10x 5' v2", "10x 5' v3", "10x multiome", "10x gene expression flex",
    "BD Rhapsody Targeted mRNA", "BD Rhapsody Whole Transcriptome Analysis", "CEL-seq2", "DroNc-seq", "Drop-seq",
    "GEXSCOPE technology", "MARS-seq", "Parse Evercode Whole Transcriptome v2", "Parse Evercode Whole Transcriptome v3",
    "Quartz-Seq2", "SCRB-seq", "SPLiT-seq", "ScaleBio single cell RNA sequencing", "Seq-Well", "Seq-Well S3", "TruDrop",
    "inDrop", "mcSCRB-seq", "microwell-seq", "sci-Plex", "sci-RNA-seq", "sci-RNA-seq3",
})


def value_filter(user: str | None, presets: Sequence[str], *, primary_only: bool) -> str:
    """The SOMA value filter that all of `user`, any of `presets` (if there are some) and `primary_only` ask for; '' for none.

    Raises
    ------
    UserError
        If `user` is no expression.
    """
    parts = []
    if primary_only:
        parts.append("is_primary_data == True")
    if presets:
        chosen = [_preset(preset) for preset in PRESETS if preset in presets]
        parts.append(f"({' or '.join(chosen)})" if len(chosen) > 1 else chosen[0])
    if user is not None:
        try:
            ast.parse(user, mode="eval")  # alone, so that no parenthesis of it can close one of ours
        except (SyntaxError, ValueError):
            example = "tissue_general == 'lung' and sex == 'female'"
            raise UserError(f'--filter {user!r} is no filter: write it like "{example}".') from None
        parts.append(f"({user})")
    return " and ".join(parts)


def _preset(preset: str) -> str:
    if preset == PAN_CANCER:
        return f"disease in {list(CANCERS)}"
    tissue = f"tissue_general not in {list(TISSUES)}" if preset == OTHERS else f"tissue_general == '{preset}'"
    return f"(suspension_type != 'na' and disease == 'normal' and {tissue})"
