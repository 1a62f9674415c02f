"""The thread that works ahead: errors, closing, what is left of it."""

import gc
import threading
import time

import pytest
from fake_split import OPTIONS, VOCABULARY, FakeSplit

from scbench.data.loader import WINDOWS_AHEAD, Loader
from scbench.data.prefetch import Prefetcher
from scbench.errors import UserError


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scbench-prefetch"]


def test_errors_of_reading_reach_the_consumer_as_they_are():
    split = FakeSplit(560, 64)
    error = UserError("shard 0, block 3 of the store is damaged: prepare it again.")
    read = split.read_extent

    def read_extent(extent):
        if len(split.reads) == 5:
            raise error
        return read(extent)

    split.read_extent = read_extent
    with Loader(split, VOCABULARY, **OPTIONS) as loader:
        good = 0
        with pytest.raises(UserError) as caught:
            for _ in loader:
                good += 1
        assert caught.value is error and good >= 1 and loader.state() == {"step": good}
        with pytest.raises(UserError):
            next(loader)
    assert not prefetch_threads()


def test_close_is_prompt_and_final():
    split = FakeSplit(560, 64)
    loader = Loader(split, VOCABULARY, **OPTIONS)
    next(loader)
    while not loader._windows._queue.full():  # then the thread waits for room
        time.sleep(0.01)
    assert len(prefetch_threads()) == 2
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 1
    assert not prefetch_threads()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_stops_its_thread():
    loader = Loader(FakeSplit(560, 64), VOCABULARY, **OPTIONS)
    next(loader)
    del loader
    gc.collect()
    assert not prefetch_threads()


def test_works_ahead_and_counts_the_waiting():
    split = FakeSplit(2_000, 50, delay=0.02)
    with Loader(split, VOCABULARY, **OPTIONS) as loader:
        next(loader)
        assert loader.wait_seconds >= 0.06  # three extents
        while not loader._windows._queue.full():
            time.sleep(0.01)
        waited = loader.wait_seconds
        for _ in range(WINDOWS_AHEAD):
            next(loader)
        assert loader.wait_seconds - waited < 0.05


def test_what_threads_make_comes_in_order():
    """Every third item takes long: the others are made meanwhile, and wait."""
    made = []

    def make(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        made.append(item)
        if item == 20:
            raise ValueError("twenty")
        return -item

    with Prefetcher((item for item in range(20)), 4, make, 3) as prefetcher:
        assert list(prefetcher) == [-item for item in range(20)]
    assert sorted(made) == list(range(20)) != made
    with Prefetcher((item for item in range(30)), 4, make, 3) as prefetcher:
        assert [next(prefetcher) for _ in range(20)] == [-item for item in range(20)]
        for _ in range(2):
            with pytest.raises(ValueError, match="twenty"):
                next(prefetcher)
    assert not prefetch_threads()
