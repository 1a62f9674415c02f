"""One counter-based generator for every random choice: splitmix64, bit-identical in NumPy, torch and random_triton.py.

A 64-bit *key* names a stream of 64-bit words; word number `counter` is

    mix(key + (counter + 1) · 0x9E3779B97F4A7C15)   (mod 2⁶⁴)

with the finaliser of Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), in Vigna's
constants. Keys nest: a word is itself a key, so `bits(bits(key(seed, stream), sample), token)` is the word of one token
of one sample. There is no state: any word can be had at any time, on any device, in any order.
"""

from enum import IntEnum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
MASK64 = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """What a word decides. The numbers are part of the format: never change or reuse one."""

    SHUFFLE = 1  # order of cells in a store
    SPLIT = 2  # split of a cell or a group
    EXTENT = 3  # order of extents in an epoch
    CELL = 4  # order of cells in an extent
    SUBSET_LAW = 5  # weighted or uniform draw of a cell's genes
    SUBSET = 6  # genes drawn of a cell
    MASK = 7  # genes masked
    DROPOUT = 8
    INITIALIZATION = 9
    EMBEDDING = 10  # genes drawn of a cell outside training
    CONTENT = 11  # hash of a cell's content
    VALIDATION = 12  # genes and masks of validation cells
    EVALUATION = 13  # folds and bootstrap
    ORDER = 14  # order of a cell's tokens, where it matters and must mean nothing
    BINS = 15  # the reference's bins: where in its run of equal edges a value falls


def _mix_int(z: int) -> int:
    z = (z ^ (z >> 30)) * MIX1 & MASK64
    z = (z ^ (z >> 27)) * MIX2 & MASK64
    return z ^ (z >> 31)


def fold(key: int, *path: int) -> int:
    """`key` nested further, one counter an element of `path`. A Python int < 2⁶⁴."""
    for counter in path:
        key = _mix_int((key + (counter + 1) * GOLDEN) & MASK64)
    return key


def key(seed: int, *path: int) -> int:
    """The key of a stream: `seed`, then the counters of `path`, first a Stream. A Python int < 2⁶⁴."""
    return fold(_mix_int(seed & MASK64), *path)


def bits(key: int | np.ndarray, counter: int | np.ndarray) -> np.ndarray:
    """Random words, uint64, of the broadcast shape of `key` (uint64) and `counter` (any integers; taken mod 2⁶⁴)."""
    key = np.asarray(key, dtype=np.uint64)
    counter = np.asarray(counter)
    if counter.dtype != np.uint64:
        counter = counter.astype(np.int64).view(np.uint64)
    with np.errstate(over="ignore"):  # 0-d arrays warn where arrays wrap silently
        z = np.atleast_1d(counter + np.uint64(1))
        z *= np.uint64(GOLDEN)
        z = z + key
        z ^= z >> np.uint64(30)
        z *= np.uint64(MIX1)
        z ^= z >> np.uint64(27)
        z *= np.uint64(MIX2)
        z ^= z >> np.uint64(31)
    return z.reshape(np.broadcast_shapes(key.shape, counter.shape))


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), never 0 or 1, from the top 52 bits of uint64 `words`."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # with 53 bits the largest would round to 1


def below(words: np.ndarray, probability: float) -> np.ndarray:
    """bool, True with `probability` (rounded to a multiple of 2⁻³²): the top 32 bits against an integer threshold."""
    return (words >> np.uint64(32)) < np.uint64(round(probability * 2**32))


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of 0 … n−1, int64 [n]: the order of n random words (ties, p ≈ n²/2⁶⁵, keep their order)."""
    return np.argsort(bits(key, np.arange(n)), kind="stable")


def generator(key: int):
    """A torch CPU generator for torch's own initialisers."""
    import torch

    return torch.Generator().manual_seed(key >> 1)  # manual_seed takes 63 bits


# --- torch ---------------------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def bits_torch(key, counter):
    """The same words as int64 tensors holding the same 64 bits. `key`: int or int64 tensor; `counter`: integer tensor."""
    key = _signed(key) if isinstance(key, int) else key
    z = (counter.long() + 1) * _signed(GOLDEN) + key
    z ^= (z >> 30).bitwise_and_(0x3FFFFFFFF)  # >> is arithmetic in torch: clear the copies of the sign
    z *= _signed(MIX1)
    z ^= (z >> 27).bitwise_and_(0x1FFFFFFFFF)
    z *= _signed(MIX2)
    z ^= (z >> 31).bitwise_and_(0x1FFFFFFFF)
    return z


def keep_threshold(probability: float) -> int:
    """Dropout's threshold: a 16-bit lane below it, read as signed, is dropped. `probability` rounds to 2⁻¹⁶."""
    return round(probability * 65536) - 32768


def keep_torch(token_keys, columns: int, probability: float):
    """Dropout decisions, bool [tokens, columns], True = keep.

    `token_keys`: int64 [tokens]. Word `column // 4` of a token's key holds four 16-bit lanes, lane `column % 4` from
    the low end.
    """
    import torch

    words = bits_torch(token_keys[:, None], torch.arange(-(-columns // 4), device=token_keys.device))
    lanes = words.view(torch.int16)  # little-endian: lane 0 is the low 16 bits
    return lanes[:, :columns] >= keep_threshold(probability)
