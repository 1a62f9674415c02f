"""Writing the manifest: the one file that makes a directory of shards a store."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from scbench.data.store import DIGEST_FILE, DIGEST_LINE, MANIFEST_FILE
from scbench.files import sha256, write_text


def file_facts(directory: Path, checksum: Callable[[Path], str | int] = sha256) -> dict[str, dict]:
    """Relative name -> bytes and SHA-256 (or another checksum, under its name) of every file under `directory`, by name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, checksum.__name__: checksum(path)}
        for path in files
    }


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write manifest.sha256 (as sha256sum would) and then manifest.json into `directory`."""
    content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    write_text(directory / DIGEST_FILE, DIGEST_LINE.format(digest))
    write_text(directory / MANIFEST_FILE, content)
