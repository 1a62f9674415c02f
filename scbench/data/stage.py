"""Copying a store to a local disk before a run, where its own file system is slow, far away or has no memory maps."""

import errno
import fcntl
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scbench.data.store import DIGEST_FILE, MANIFEST_FILE, Store
from scbench.errors import UserError
from scbench.files import sha256, sync

COPIES_AT_ONCE = 8  # files: a network file system answers many requests sooner than one after the other
READ_BYTES = 1 << 20


def stage(store: Store, directory: Path) -> Store:
    """The same store in `directory`, copied there unless an earlier run, or another process of this node, has done so.

    Every file is held to its SHA-256 on the way. Processes of one node wait for the first one. A copy that was killed goes
    on with the files that are whole; several stores can be in one directory, and nothing is ever removed from it.

    Raises
    ------
    UserError
        If a file of the store is damaged, or the directory cannot be written or is too small.
    """
    staged = directory / f"store-{store.fingerprint[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / f".{staged.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not staged.exists():
                _copy(store, staged)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--stage-to {directory}: the disk is full: make room or give another directory.") from error
        raise UserError(f"--stage-to {directory}: the store cannot be copied there ({error.strerror}).") from error
    return Store.open(staged)


def _copy(store: Store, staged: Path) -> None:
    partial = staged.with_name(f".partial-{staged.name}")
    partial.mkdir(exist_ok=True)
    files = store.manifest["files"]
    store.check_files()
    needed = sum(facts["bytes"] for facts in files.values()) - sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"--stage-to {staged.parent} has {free / 1e9:,.1f} GB free, and the store takes {needed / 1e9:,.1f} GB."
        )
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _copy_file(store.path / name, partial / name, files[name]["sha256"]), files):
            pass
    for name in (DIGEST_FILE, MANIFEST_FILE):  # opening checks them
        shutil.copyfile(store.path / name, partial / name)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    os.replace(partial, staged)
    sync(staged.parent)


def _copy_file(source: Path, target: Path, digest: str) -> None:
    if target.exists() and sha256(target) == digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while piece := reading.read(READ_BYTES):
            hasher.update(piece)
            writing.write(piece)
    if hasher.hexdigest() != digest:
        raise UserError(f"{source} is damaged (wrong SHA-256): restore it or prepare the store again.")
