"""The generator against published words, a plain-Python oracle, itself in torch, and statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.kernels import random
from scbench.kernels.random import Stream

MASK = (1 << 64) - 1
KEYS = [0, 1, 42, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
COUNTERS = [0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**31), -(2**63)]


def splitmix_word(key: int, counter: int) -> int:
    """Word `counter` of the published sequential generator: add the constant `counter` + 1 times, then finalise."""
    z = (key + 0x9E3779B97F4A7C15 * (counter + 1)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def as_unsigned(words: torch.Tensor) -> np.ndarray:
    return words.numpy().view(np.uint64)


@pytest.mark.parametrize(
    ("state", "words"),
    [  # Vigna's splitmix64.c, as printed by the implementations of Rosetta Code and of Java's SplittableRandom tests
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (
            1234567,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
        ),
    ],
)
def test_published_words(state, words):
    assert random.bits(state, np.arange(len(words))).tolist() == words
    assert as_unsigned(random.bits_torch(state, torch.arange(len(words)))).tolist() == words
    assert [random.fold(state, counter) for counter in range(len(words))] == words


@settings(max_examples=200)
@given(st.integers(0, MASK), st.integers(-(2**63), 2**63 - 1))
def test_every_implementation_agrees_with_plain_integers(key, counter):
    expected = splitmix_word(key, counter)
    assert random.bits(key, counter).item() == expected
    assert random.bits(np.uint64(key), np.array([counter]))[0] == expected
    assert random.fold(key, counter) == expected
    signed_key = torch.tensor(key - 2**64 if key >= 2**63 else key)
    for torch_key in (key, signed_key):
        assert as_unsigned(random.bits_torch(torch_key, torch.tensor([counter])))[0] == expected


def test_edge_keys_and_counters_broadcast():
    keys, counters = np.array(KEYS, dtype=np.uint64), np.array(COUNTERS, dtype=np.int64)
    words = random.bits(keys[:, None], counters[None, :])
    assert words.dtype == np.uint64 and words.shape == (len(KEYS), len(COUNTERS))
    assert words.tolist() == [[splitmix_word(key, counter) for counter in COUNTERS] for key in KEYS]
    in_torch = random.bits_torch(torch.from_numpy(keys.view(np.int64))[:, None], torch.from_numpy(counters)[None, :])
    assert np.array_equal(as_unsigned(in_torch), words)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_counters_of_any_integer_type(dtype):
    counters = np.array([0, 1, 200], dtype=dtype)
    before = counters.copy()
    assert random.bits(9, counters).tolist() == [splitmix_word(9, c) for c in (0, 1, 200)]
    assert np.array_equal(counters, before)  # arguments stay as they are
    assert random.bits(9, np.zeros(0, dtype=dtype)).shape == (0,)


def test_unsigned_counters_past_63_bits_and_negative_ones_are_the_same_words():
    assert random.bits(5, np.array([2**64 - 1], dtype=np.uint64)) == random.bits(5, np.array([-1]))


def test_bits_leave_their_arguments_alone():
    key, counter = np.array([1, 2], dtype=np.uint64), np.array([3, 4], dtype=np.uint64)
    random.bits(key, counter)
    assert key.tolist() == [1, 2] and counter.tolist() == [3, 4]
    counter = torch.tensor([3, 4])
    random.bits_torch(1, counter)
    assert counter.tolist() == [3, 4]


@pytest.mark.parametrize("seed", [0, -1, -(2**40), 2**63, 2**64 - 1, 2**70 + 3])
def test_any_integer_is_a_seed(seed):
    key = random.key(seed, Stream.MASK, 7)
    assert 0 <= key < 2**64
    assert key == random.key(seed % 2**64, Stream.MASK, 7)
    assert key != random.key(seed + 1, Stream.MASK, 7)


def test_keys_nest():
    """A word is a key: the scalar path, the array path and torch's give one word of one token of one sample."""
    nested = random.bits(random.bits(random.key(3, Stream.SUBSET), np.array([11])), np.array([500]))
    assert nested[0] == random.key(3, Stream.SUBSET, 11, 500) == random.fold(random.key(3), Stream.SUBSET, 11, 500)
    in_torch = random.bits_torch(random.bits_torch(random.key(3, Stream.SUBSET), torch.tensor([11])), torch.tensor([500]))
    assert as_unsigned(in_torch)[0] == nested[0]


def test_streams_are_distinct_and_their_numbers_are_fixed():
    assert {stream.name: stream.value for stream in Stream} == {
        "SHUFFLE": 1, "SPLIT": 2, "EXTENT": 3, "CELL": 4, "SUBSET_LAW": 5, "SUBSET": 6, "MASK": 7, "DROPOUT": 8,
        "INITIALIZATION": 9, "EMBEDDING": 10, "CONTENT": 11, "VALIDATION": 12, "EVALUATION": 13,
        "ORDER": 14, "BINS": 15,
    }  # fmt: skip
    keys = {random.key(seed, stream, sample) for seed in range(50) for stream in Stream for sample in range(50)}
    assert len(keys) == 50 * len(Stream) * 50


def test_uniform_stays_inside_the_open_interval():
    extremes = random.uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < extremes[0] < 1e-15 and 1 - 1e-15 < extremes[1] < 1


def chi_square(observed: np.ndarray, expected: np.ndarray | float) -> float:
    """Standard deviations by which the statistic exceeds its mean."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = observed.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("key", [0, random.key(0, Stream.MASK), 2**64 - 1])
def test_words_are_uniform(key):
    words = random.bits(key, np.arange(200_000))
    assert abs(chi_square(np.bincount((words >> np.uint64(56)).astype(int), minlength=256), 200_000 / 256)) < 5
    for bit in range(64):
        ones = np.count_nonzero(words >> np.uint64(bit) & np.uint64(1))
        assert abs(ones - 100_000) < 5 * np.sqrt(50_000)
    u = random.uniform(words)
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * 200_000)


@pytest.mark.parametrize("how", ["neighbouring samples", "neighbouring streams", "neighbouring seeds", "lag one"])
def test_neighbouring_streams_are_independent(how):
    """The joint distribution of two streams' words on a 16 × 16 grid is flat, whatever distinguishes the streams."""
    tokens = np.arange(100_000)
    one = random.key(5, Stream.SUBSET, 100)
    other = {
        "neighbouring samples": random.key(5, Stream.SUBSET, 101),
        "neighbouring streams": random.key(5, Stream.MASK, 100),
        "neighbouring seeds": random.key(6, Stream.SUBSET, 100),
        "lag one": one,
    }[how]
    a, b = random.bits(one, tokens), random.bits(other, tokens + (how == "lag one"))
    cells = (a >> np.uint64(60)) * np.uint64(16) + (b >> np.uint64(60))
    assert abs(chi_square(np.bincount(cells.astype(int), minlength=256), 100_000 / 256)) < 5
    differing = np.unpackbits((a ^ b).view(np.uint8)).mean()
    assert abs(differing - 0.5) < 5 * 0.5 / np.sqrt(64 * 100_000)


def test_one_token_over_many_samples_is_uniform():
    """The first word of each nested key, which every dropout and mask decision of one gene rests on."""
    words = random.bits(random.bits(random.key(0, Stream.MASK), np.arange(200_000)), 17)
    assert abs(chi_square(np.bincount((words >> np.uint64(56)).astype(int), minlength=256), 200_000 / 256)) < 5


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.15, 0.4, 0.5, 1.0])
def test_below_has_its_probability(probability):
    hits = random.below(random.bits(1, np.arange(200_000)), probability).mean()
    assert abs(hits - probability) <= 5 * np.sqrt(probability * (1 - probability) / 200_000)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutation_is_one(n):
    permuted = random.permutation(random.key(0, Stream.EXTENT, 3), n)
    assert permuted.dtype == np.int64 and np.array_equal(np.sort(permuted), np.arange(n))


def test_permutations_are_equally_likely():
    seen = [tuple(random.permutation(random.key(seed, Stream.CELL), 4)) for seed in range(4800)]
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 24 and abs(chi_square(counts, 200.0)) < 5


def test_generator_repeats_itself():
    draws = [torch.rand(4, generator=random.generator(random.key(seed, Stream.INITIALIZATION))) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    random.generator(2**64 - 1)


# --- dropout -------------------------------------------------------------------------------------------------------


def keep_oracle(key: int, column: int, probability: float) -> bool:
    lane = splitmix_word(key, column // 4) >> (16 * (column % 4)) & 0xFFFF
    signed = lane - 65536 if lane >= 32768 else lane
    return signed >= round(probability * 65536) - 32768


@pytest.mark.parametrize("columns", [1, 3, 4, 6, 130])
@pytest.mark.parametrize("probability", [0.0, 0.15, 0.999])
def test_dropout_decisions_are_those_of_plain_integers(columns, probability):
    keys = random.bits(random.key(2, Stream.DROPOUT), np.arange(5))
    keep = random.keep_torch(torch.from_numpy(keys.view(np.int64)), columns, probability)
    assert keep.dtype == torch.bool and keep.shape == (5, columns)
    assert keep.tolist() == [[keep_oracle(int(key), c, probability) for c in range(columns)] for key in keys]


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.5])
def test_dropout_has_its_probability_in_every_lane(probability):
    keys = random.bits(random.key(2, Stream.DROPOUT), np.arange(4000)).view(np.int64)
    dropped = 1 - random.keep_torch(torch.from_numpy(keys), 64, probability).double().mean(0)
    deviation = 5 * np.sqrt(max(probability * (1 - probability), 0) / 4000)
    assert (dropped - probability).abs().max() <= deviation
