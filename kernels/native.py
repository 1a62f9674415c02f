"""A C file of this package as a library: compiled at its first use, kept for the next.

It goes to `$SCBENCH_CACHE`, else `$XDG_CACHE_HOME/scbench`, else `~/.cache/scbench`, under a name made of the source and its
headers, the compiler's command and the processor; several processes may make it at once (each writes a file of its own and
renames it).
The compiler is `$CC`, else cc, gcc or clang. SCBENCH_SAMPLER says who does the work of all C files here, the loader's
(sampler.c) and prepare's (cells.c): native or numpy; by default NumPy where there is no compiler.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np

# no contraction: a fused a·b + c rounds differently; no strict aliasing: scratch memory is used for several types
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")
OWN_PROCESSOR = "-march=native"  # not every compiler knows it


class BuildError(RuntimeError):
    """A library that cannot be had; the message is one sentence."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a C file; its calls let other Python threads run.

    Raises
    ------
    BuildError
        If there is no compiler, it fails, or there is no place to keep what it makes.
    """
    compiler = _compiler()
    code = b"\0".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h"))))
    failure = ""
    for flags in ((*FLAGS, OWN_PROCESSOR), FLAGS):
        command = [*compiler, *flags]
        key = hashlib.sha256(b"\0".join([code, shlex.join(command).encode(), _processor()])).hexdigest()[:24]
        library = cache_directory() / f"{source.stem}-{key}.so"
        with contextlib.suppress(OSError):  # absent, or empty after a crash of the machine
            return ctypes.CDLL(str(library))
        failure = _compile(command, source, library)
        if not failure:
            return ctypes.CDLL(str(library))
    raise BuildError(f"{shlex.join(compiler)} cannot compile {source.name}: {failure}")


def chosen(source: Path, work: str) -> ctypes.CDLL | None:
    """The library of a C file; None, with a warning unless it was asked for, if NumPy is to do the `work`.

    Raises
    ------
    BuildError
        If SCBENCH_SAMPLER is native and the library cannot be had, or is anything else than native or numpy.
    """
    choice = os.environ.get("SCBENCH_SAMPLER", "")
    if choice not in ("", "native", "numpy"):
        raise BuildError(f"SCBENCH_SAMPLER is {choice!r}: it must be native or numpy")
    if choice == "numpy":
        return None
    try:
        return load(source)
    except BuildError as error:
        if choice == "native":
            raise BuildError(f"SCBENCH_SAMPLER is native, but {error}") from None
        warnings.warn(f"{work} by NumPy, which is slower: {error} (SCBENCH_SAMPLER=numpy says that it may be so)",
                      stacklevel=3)
        return None


def takes(array: np.ndarray) -> bool:
    """Whether the C code reads genes or counts of this dtype: uint8, uint16 or uint32."""
    return array.dtype.kind == "u" and array.itemsize <= 4


def address(array: np.ndarray) -> int:
    """Where an array's first element is; the caller keeps the array for as long as this is used."""
    return array.__array_interface__["data"][0]


def cache_directory() -> Path:
    """Where compiled libraries are kept."""
    if own := os.environ.get("SCBENCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scbench"


def _compiler() -> list[str]:
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C compiler (cc, gcc or clang): install one, or name it in CC")


def _compile(command: list[str], source: Path, library: Path) -> str:
    """Make `library`; returns what the compiler said if it failed."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as directory:
            made = Path(directory) / library.name
            result = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True)
            if result.returncode:
                return (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[0]
            os.replace(made, library)
    except OSError as error:
        return str(error)
    return ""


@cache
def _processor() -> bytes:
    """What -march=native depends on: nodes of a cluster share a home directory, not always a processor."""
    names = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        names += [line for line in lines if line.startswith(("model", "flags", "Features", "CPU part", "isa"))]
    return "\n".join(names).encode()
