"""Parts of a long piece of work that survive a kill: a directory each, published whole, checked before it is used again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from scbench.data.manifest import file_facts
from scbench.files import crc32c, published_directory, sha256

FACTS_FILE = "part.json"


def finished_part(directory: Path, build: Callable[[Path], dict], durable: bool = True) -> dict:
    """The facts of the part in `directory`, built now unless a whole one is there from an earlier run.

    `build` gets an empty directory, writes files into it and returns JSON-able facts. They come back with "files" (bytes
    and SHA-256 of each) added. A part whose files changed is built again. What will be part of a store is `durable`; the
    rest isn't synced, and has a CRC-32C instead.
    """
    checksum = sha256 if durable else crc32c
    facts = _load(directory, checksum)
    if facts is not None:
        return facts
    shutil.rmtree(directory, ignore_errors=True)
    with published_directory(directory, durable) as partial:
        facts = build(partial)
        facts["files"] = file_facts(partial, checksum)
        (partial / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    return json.loads(json.dumps(facts))  # the same types as from an earlier run


def _load(directory: Path, checksum: Callable[[Path], str | int]) -> dict | None:
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = file_facts(directory, checksum)
    files.pop(FACTS_FILE)
    return facts if files == facts["files"] else None
