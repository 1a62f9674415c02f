"""Build scbench/data/gene_table/fingerprint_{human,mouse}.txt out of the gene table.

Run: python tools/build_fingerprint_genes.py

The genes by which a copy of a cell is known whatever the file's names and filters are: one Ensembl id a line, the core ones
marked with a `*`, in the order of SHA-256 of the id, which is the gene's number. Ids and symbols both lead to every
gene of the list, and old files measure it: it owns its symbol, its id is an old one, and it is no RNA gene, antibody or
receptor segment, pseudogene, clone or mitochondrial gene. Ribosomal proteins are left out too: all cells express them, and
many files drop them.

The core is what filters spare: subunits of the cell's basic machines, expressed everywhere and hardly variable, that never had
another symbol. A core of a few hundred genes is a compromise: more genes tell shallow cells apart, and each one is a
chance that a filter drops it.
"""

import hashlib
import re
from pathlib import Path

from scbench.data.fingerprint_genes import MOST_GENES
from scbench.data.gene_table import PREFIXES, gene_table

TARGET = Path(__file__).resolve().parents[1] / "scbench" / "data" / "gene_table"
NEWEST = {"human": 200_000, "mouse": 80_000}  # digits of an id: above, mostly RNA genes, read-throughs and predictions
UNUSUAL = re.compile(
    r"(RNU|SNOR|MIR\d|MIRLET|LINC|RN7S|RNA5|SCARNA|MT-|RNY|TRNA|VTRNA|RP[LS]\d|MRP[LS]\d+P|TR[ABGD][VJDC]|IG[HKL][VJDC]).*"
    r"|.*(-AS\d*|-IT\d|-DT|-OT\d|P\d+|\d+P|\.\d+|-PS\d*|RIK)|GM\d+",
    re.IGNORECASE,
)
CORE = re.compile(
    r"(PSM[ABCDEG]\d|NDUF[ABCSV]|COX\d|UQCR|SNRP|SRSF\d|HNRNP|EIF\d|SF3[AB]\d|CCT\d|ARPC\d|COPS\d|POLR2|TMED\d|TIMM\d|TOMM\d"
    r"|CHMP\d|SEC61).*",
    re.IGNORECASE,
)
# in files on GRCh37 these symbols, or their clones' names, lead to another gene than the ids do
CLASHING = {"PSMA2", "NDUFB8", "SF3B6", "EIF2S3B"}


def lines(organism: str) -> list[str]:
    """The file of an organism."""
    table, prefix = gene_table(organism), PREFIXES[organism]
    renamed = set(table.previous.values())
    chosen = {
        id_: symbol for symbol, id_ in table.owners.items()
        if int(id_[len(prefix):]) < NEWEST[organism] and not UNUSUAL.fullmatch(symbol)
    }
    core = {id_ for id_, symbol in chosen.items() if CORE.fullmatch(symbol) and id_ not in renamed and symbol not in CLASHING}
    ordered = sorted(chosen, key=lambda id_: hashlib.sha256(id_.encode()).digest())
    kept = [id_ for id_ in ordered if id_ in core]
    kept += [id_ for id_ in ordered if id_ not in core][: MOST_GENES - len(kept)]
    kept.sort(key=lambda id_: hashlib.sha256(id_.encode()).digest())
    return [id_ + "*" * (id_ in core) for id_ in kept]


if __name__ == "__main__":
    for name in PREFIXES:
        (TARGET / f"fingerprint_{name}.txt").write_text("\n".join(lines(name)) + "\n", encoding="ascii")
