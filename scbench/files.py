"""Files that are either whole or absent: everything is written under a temporary name, synced, and renamed."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from scbench.errors import UserError


def _partial(path: Path) -> Path:
    return path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")  # keeps the suffix: some writers look at it


def refuse_existing(path: Path) -> None:
    """Raise UserError if `path` exists, unless it is an empty directory: no verb ever overwrites a user's file."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"the output {path} exists already: remove it or give another --output.")


def sync(path: Path) -> None:
    """Flush a file that a library wrote, or the renames inside a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def published_directory(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success every file in it is synced and it is renamed to `path`.

    `durable` false: nothing is synced, because files that a power cut damaged will be found out and made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    temporary.mkdir()
    try:
        yield temporary
        if durable:
            for file in temporary.rglob("*"):
                sync(file)
        if path.is_dir():
            path.rmdir()  # only an empty directory can be in the way: refuse_existing saw to that
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with published_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; of a directory, that of the lines `sha256sum` prints of its files, sorted by name."""
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{sha256(path / file)}  {file}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32c(path: Path) -> int:
    """CRC-32C of a file: tells damage, not intent, in a seventh of the time of SHA-256."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = google_crc32c.extend(checksum, block)
    return checksum
