"""The pool: order, errors, and a worker that dies."""

import os

import pytest

from scbench.data.workers import WorkerKilledError, Workers
from scbench.errors import UserError


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_tasks(count):
    done = []
    with Workers(count) as pool:
        assert pool.map(abs, range(-9, 0), done.append) == list(range(9, 0, -1))
        assert pool.map(abs, [], done.append) == []
        with pytest.raises(ValueError, match="invalid literal"):
            pool.map(int, ["1", "x", "2"], done.append)
    assert sorted(done[:9]) == list(range(-9, 0))


def test_workers_have_the_environment_of_now(monkeypatch):
    """The server that they are forked from keeps that of its start."""
    for value in ("first", "second"):
        monkeypatch.setenv("SCBENCH_OF_NOW", value)
        with Workers(2) as pool:
            assert pool.map(os.getenv, ["SCBENCH_OF_NOW"] * 2, lambda _: None) == [value] * 2


def test_a_worker_that_dies_is_an_error_of_its_own():
    with Workers(2) as pool, pytest.raises(WorkerKilledError, match="fewer --workers"):
        pool.map(os._exit, [1, 1], lambda _: None)
    assert issubclass(WorkerKilledError, UserError)
