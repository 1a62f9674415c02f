"""Which split a cell goes to: by cell in exact shares, or by whole groups of cells. Keyed by content, never by position."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from scbench.data.shard_format import SPLITS
from scbench.errors import UserError
from scbench.kernels import random

Group = tuple[str, ...]  # the values of the --split-by columns


def split_cells(content_hash: np.ndarray, shares: tuple[float, float, float], seed: int) -> np.ndarray:
    """The split of each cell, int8 [cells], an index into SPLITS.

    The distinct contents, in the order of keyed words, are cut at the rounded cumulative shares; cells of equal content go
    together. Every split with a positive share gets one at least, if there are enough.

    Parameters
    ----------
    content_hash
        uint64 [cells].
    shares
        Shares of the splits; they sum to 1.
    """
    contents, inverse = np.unique(content_hash, return_inverse=True)
    cuts = np.floor(np.cumsum(shares) * len(contents) + 0.5).astype(np.int64)
    sizes = np.diff(cuts, prepend=0)
    wanted = [split for split, share in enumerate(shares) if share > 0]
    sizes[wanted[-1]] += len(contents) - sizes.sum()  # what rounding of the shares' sum left over
    for split in wanted:
        if sizes[split] == 0 and sizes.max() > 1:
            sizes[sizes.argmax()] -= 1
            sizes[split] = 1
    order = np.argsort(random.bits(random.key(seed, random.Stream.SPLIT), contents))
    split_of_content = np.empty(len(contents), dtype=np.int8)
    split_of_content[order] = np.repeat(np.arange(len(SPLITS), dtype=np.int8), sizes)
    return split_of_content[inverse]


def split_by_word(content_hash: np.ndarray, shares: tuple[float, float, float], seed: int) -> np.ndarray:
    """The same by the content of a cell alone, whatever other cells there are: the shares are those of the chances."""
    words = random.bits(random.key(seed, random.Stream.SPLIT), content_hash)
    splits = np.searchsorted(np.cumsum(shares)[:2], random.uniform(words), side="right")
    return np.minimum(splits, np.flatnonzero(shares)[-1]).astype(np.int8)  # the sum of the shares may be just under 1


def keep_once(content_hash: np.ndarray, n_genes: np.ndarray, total: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Which cells stay, bool [cells], so that none is there twice, and no content in two splits.

    The cells come in order: sorted by content_hash in some way, equal ones by n_genes and total, and the copy to keep first.
    No content may be in two splits, not even with another total: its first copy says in which it stays.
    """
    new = np.ones(len(content_hash), dtype=bool)  # a content
    new[1:] = content_hash[1:] != content_hash[:-1]
    different = new.copy()
    for field in (n_genes, total):
        different[1:] |= field[1:] != field[:-1]
    first = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    return different & (split == split[first])


def group_id(group: Group) -> int:
    """A 64-bit name of a group, the same in every process: the start of the SHA-256 of its values as JSON."""
    digest = hashlib.sha256(json.dumps(group).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def check_group_count(groups: int, shares: tuple[float, float, float]) -> None:
    """UserError if there are fewer groups than splits with a positive share."""
    wanted = sum(share > 0 for share in shares)
    if groups < wanted:
        raise UserError(
            f"--split-by gives {groups} group{'s' * (groups != 1)} for {wanted} splits: "
            "choose other columns, or give a split the share 0 in --split."
        )


def split_groups(sizes: Mapping[Group, int], shares: tuple[float, float, float], seed: int) -> dict[Group, int]:
    """The split of each group, an index into SPLITS.

    Groups come in the order of keyed words; each goes to the split that lacks most cells, and the last ones to splits that
    are still empty.

    Parameters
    ----------
    sizes
        Group -> its cells.
    shares
        Shares of the splits; they sum to 1.

    Raises
    ------
    UserError
        If there are fewer groups than splits with a positive share.
    """
    wanted = [split for split, share in enumerate(shares) if share > 0]
    check_group_count(len(sizes), shares)
    key = random.key(seed, random.Stream.SPLIT)
    order = sorted(sizes, key=lambda group: (random.fold(key, group_id(group)), group))
    total = sum(sizes.values())
    lacking = np.array(shares) * total
    empty = set(wanted)
    result = {}
    for position, group in enumerate(order):
        candidates = empty if len(order) - position == len(empty) else wanted
        split = max(sorted(candidates), key=lambda candidate: lacking[candidate])
        result[group] = split
        lacking[split] -= sizes[group]
        empty.discard(split)
    return result
