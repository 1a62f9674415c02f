"""How a rank's share of a global batch is cut into the micro-batches that it handles one after the other."""

import heapq

import numpy as np

from scbench.errors import UserError


def micro_steps(batch_cells: int, world: int, micro_batch_cells: int | None) -> int:
    """Micro-steps of every optimizer step, the same on every rank, from the largest share of a rank: ⌈⌈B/W⌉ / micro⌉.

    Never more than ⌊B/W⌋, so no rank ever has an empty one: at `micro_batch_cells` 1 and a batch that isn't a multiple of
    the ranks, some micro-batches therefore hold two cells. None: one micro-step.

    Raises
    ------
    UserError
        If a rank would be left without cells.
    """
    if batch_cells < world:
        raise UserError(
            f"--batch-cells is {batch_cells}, fewer than the {world} ranks: give at least one cell a rank, or use fewer ranks."
        )
    if micro_batch_cells is None:
        return 1
    largest = -(-batch_cells // world)
    return min(-(-largest // micro_batch_cells), batch_cells // world)


def balance(tokens: np.ndarray, steps: int, micro_batch_cells: int | None) -> list[np.ndarray]:
    """Share cells among micro-batches so that their tokens come out even.

    The longest cell goes first, each to the micro-batch with the fewest tokens that still has room (LPT).

    Parameters
    ----------
    tokens
        int [n]: each cell's tokens, at least 1; n ≥ steps.
    steps
        How many micro-batches.
    micro_batch_cells
        Room in one, raised to ⌈n / steps⌉ if it is less; None: unlimited.

    Returns
    -------
    list of int64 arrays
        For each micro-batch the positions of its cells, ascending; none is empty.
    """
    if steps == 1:
        return [np.arange(len(tokens))]
    room = len(tokens) if micro_batch_cells is None else max(micro_batch_cells, -(-len(tokens) // steps))
    chosen: list[list[int]] = [[] for _ in range(steps)]
    heap = [(0, i) for i in range(steps)]
    for cell in np.argsort(-np.asarray(tokens, dtype=np.int64), kind="stable").tolist():
        load, i = heapq.heappop(heap)
        chosen[i].append(cell)
        if len(chosen[i]) < room:
            heapq.heappush(heap, (load + int(tokens[cell]), i))
    return [np.sort(np.array(cells, dtype=np.int64)) for cells in chosen]
