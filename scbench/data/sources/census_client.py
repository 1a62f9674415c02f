"""Opening the CELLxGENE Census with its own client, and what goes wrong with it in one sentence each."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

from scbench.errors import RetryError, UserError

if TYPE_CHECKING:
    import pandas as pd
    import tiledbsoma

ORGANISM = "homo_sapiens"
BUFFER_BYTES = 32 << 20  # of each column while it is read; the client's own default is 1 GiB
VERSION = re.compile(r"\d{4}-\d{2}-\d{2}|stable|latest")
OLDEST_CLIENT = "1.17"  # as setup.py asks for
TOO_OLD = re.compile(r"encoding version|(format|schema) version|newer|upgrad", re.IGNORECASE)
NETWORK = re.compile(r"curl|resolve|connection|timed? ?out|network|HTTP Response Code|S3:|GCS:|Azure", re.IGNORECASE)


def census_name(location: str) -> str:
    """What the store calls a census: its version, or the last part of its URI or path (never a path of the machine)."""
    return f"census:{location if VERSION.fullmatch(location) else location.rstrip('/').rsplit('/', 1)[-1]}"


def _client() -> ModuleType:
    """The client; UserError if it is not there or too old."""
    try:
        import cellxgene_census
    except ImportError as error:
        raise UserError(
            f"a census input needs its client, which cannot be imported ({error}): pip install 'scbench[census]'."
        ) from None
    version = cellxgene_census.__version__
    if [int(n) for n in re.findall(r"\d+", version)[:2]] < [int(n) for n in OLDEST_CLIENT.split(".")]:
        raise UserError(f"cellxgene-census {version} is too old, {OLDEST_CLIENT} is needed: pip install -U 'scbench[census]'.")
    return cellxgene_census


def pinned(location: str) -> str:
    """The release that `stable` or `latest` means today; any other location as it is."""
    return _release(location)["release_build"] if location in ("stable", "latest") else location


def release_facts(location: str) -> dict:
    """Whether the client's directory of releases calls a version one with long-term support; {} for a URI."""
    if not VERSION.fullmatch(location):
        return {}
    return {"long_term_support": bool(_release(location).get("flags", {}).get("lts", False))}


def _release(version: str) -> dict:
    client = _client()
    with reading(version):
        return client.get_census_version_description(version)


@lru_cache(maxsize=1)
def open_census(location: str) -> "tiledbsoma.Collection":
    """The census of a version (a date) or at a URI, kept open in this process.

    Raises
    ------
    UserError
        If the client is not installed or too old, or there is no such census.
    RetryError
        If the network fails.
    """
    client = _client()
    buffers = {"soma.init_buffer_bytes": BUFFER_BYTES, "py.init_buffer_bytes": BUFFER_BYTES}
    where = {"census_version": location} if VERSION.fullmatch(location) else {"uri": location}
    with reading(location):
        context = client.get_default_soma_context(tiledb_config=buffers)
        census = client.open_soma(**where, context=context)
        missing = [name for name in ("census_info", "census_data") if name not in census]
        if missing or ORGANISM not in census["census_data"]:
            raise UserError(f"{location} is no census of human cells: it has no {missing[0] if missing else ORGANISM}.")
    return census


def experiment(census: "tiledbsoma.Collection") -> "tiledbsoma.Experiment":
    """The human cells of a census."""
    return census["census_data"][ORGANISM]


def datasets(census: "tiledbsoma.Collection") -> "pd.DataFrame":
    """census_info/datasets: a row a dataset, with dataset_id, collection_id and, as far as they are there, citations."""
    return census["census_info"]["datasets"].read().concat().to_pandas()


def build(census: "tiledbsoma.Collection") -> dict:
    """What a census says of itself: its summary (build date, schema), and a digest of that and of its table of datasets."""
    summary = census["census_info"]["summary"].read().concat().to_pandas()
    facts = dict(zip(summary["label"].astype(str), summary["value"].astype(str), strict=True))
    said = json.dumps([facts, datasets(census).astype(str).to_dict("list")], sort_keys=True)
    kept = {name: facts[name] for name in ("census_build_date", "census_schema_version") if name in facts}
    return {**kept, "info_sha256": hashlib.sha256(said.encode()).hexdigest()}


@contextlib.contextmanager
def reading(location: str, value_filter: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one sentence."""
    try:
        yield
    except (UserError, MemoryError, AttributeError, TypeError, NameError, AssertionError):  # its own sentence, or a bug
        raise
    except Exception as error:  # the client's errors come from four libraries and share no class but this
        kind, said = type(error).__name__, str(error).strip().splitlines()[0] if str(error).strip() else ""
        said = said.removeprefix("SOMAError: ").strip("'\" .")
        if NETWORK.search(f"{kind} {said}"):
            raise RetryError(
                f"the census {location} cannot be reached: {said[:200]}; run the same command again when the network is back "
                "(what was finished is used again)."
            ) from error
        if TOO_OLD.search(said):
            raise UserError(
                f"the census client is too old for {location} ({said[:200]}): pip install -U 'scbench[census]'."
            ) from error
        if value_filter is not None:
            raise UserError(f"the census does not take the filter {value_filter}: {said[:200]}.") from error
        if "not valid" in said or kind == "DoesNotExistError":
            raise UserError(
                f"there is no census {location}: give census: for the default, census:2025-01-30 for a release, or "
                "census:URI for a SOMA collection of your own."
            ) from error
        raise UserError(f"the census {location} cannot be read: {said[:200]} ({kind}).") from error
