"""The traffic meter: bytes that Triton launches and plain torch operations move, counted without a GPU.

The rule (written down before any kernel was measured): an operand whose whole reused set fits 8 MB counts each distinct
32-byte sector once a launch; others count every load. Saved tensors and partial sums count as moved. In detail:

- an operand is a storage that a launch was given; loads and stores are counted apart, each by the rule;
- its reused set is the sectors that more than one load (or store) instruction of the launch touches, all of them; a lenient
  reading is reported beside it, `cached`: those that lie between their first and last use at one time, programs run in order;
- "every load" is true mask elements times element size, and never less than the sectors that the instruction touches;
- an atomic is a load and a store;
- a plain torch operation reads its inputs and writes its outputs; a view moves nothing; a gather reads what it returns, a
  scatter reads and writes what it is given.

Triton launches are seen under the interpreter only (TRITON_INTERPRET=1). A load outside every operand is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECTOR = 32
CACHE = 8_000_000

WRITTEN_ONLY = {"zero_", "fill_", "copy_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_"}
GATHERS = {"embedding", "index_select", "index", "gather", "take"}  # read from their first argument what they return
SCATTERS = {"index_add_", "index_add", "index_put_", "_index_put_impl_", "index_put", "scatter_add_", "index_copy_"}
FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # read a shape, no elements
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh", "set_",
        "resize_"}


class _Access:
    """The loads, or the stores, of one operand in one launch."""

    def __init__(self, sectors: int):
        self.counts = np.zeros(sectors, dtype=np.uint32)  # instructions that touched each sector
        self.first = np.zeros(sectors, dtype=np.int64)  # the number of the first of them, and of the last
        self.last = np.zeros(sectors, dtype=np.int64)
        self.every = 0  # bytes of all instructions

    def touch(self, where: slice | np.ndarray, marks: np.ndarray | int, now: int) -> None:
        counts = self.counts[where] + marks
        touched = np.broadcast_to(np.asarray(marks, dtype=bool), counts.shape)
        self.first[where] = np.where(touched & (counts == 1), now, self.first[where])
        self.last[where] = np.where(touched, now, self.last[where])
        self.counts[where] = counts

    def moved(self, *, at_one_time: bool) -> int:
        """Bytes by the rule; `at_one_time`: the reused set is what lies between its first and last use at one time."""
        reused = self.counts > 1
        size = np.count_nonzero(reused)
        if at_one_time and size:
            first, last = self.first[reused], self.last[reused]
            size = (np.bincount(first, minlength=last.max() + 1) - np.bincount(last)).cumsum().max()
        return int(np.count_nonzero(self.counts)) * SECTOR if size * SECTOR <= CACHE else self.every


@dataclass
class Launch:
    """What one launch moved."""

    kernel: str
    loaded: dict[str, int]  # bytes, by the operand's argument name ("a+b" if two share a storage)
    stored: dict[str, int]
    cached: int  # bytes in all, if what lies between its first and last use at one time is the reused set

    @property
    def moved(self) -> int:
        """Bytes."""
        return sum(self.loaded.values()) + sum(self.stored.values())


@dataclass
class Traffic:
    """What was counted: Triton launches and plain torch operations, in order."""

    launches: list[Launch] = field(default_factory=list)
    operations: list[tuple[str, int]] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Bytes."""
        return sum(launch.moved for launch in self.launches) + sum(moved for _, moved in self.operations)

    @property
    def cached(self) -> int:
        """Bytes, by the lenient reading of the rule."""
        return sum(launch.cached for launch in self.launches) + sum(moved for _, moved in self.operations)


class _Operands:
    """The storages of a launch, and where in them its instructions go."""

    def __init__(self, kernel: str, arguments: dict[str, object]):
        self.kernel = kernel
        names: dict[tuple[int, int], list[str]] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                storage = value.untyped_storage()
                names.setdefault((storage.data_ptr(), storage.nbytes()), []).append(name)
        self.ranges = sorted(names)
        self.starts = np.array([start for start, _ in self.ranges], dtype=np.uint64)
        self.names = ["+".join(names[key]) for key in self.ranges]
        self.accesses: dict[tuple[str, int], _Access] = {}
        self.instructions, self.patched = 0, set()

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask.astype(bool)].astype(np.uint64)
        if not addresses.size:
            return
        self.instructions += 1
        low, high = addresses.min(), addresses.max()
        first, last = np.searchsorted(self.starts, [low, high], side="right") - 1
        if first == last:
            self._touch_one(kind, int(first), addresses, int(low), int(high), size)
            return
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            part = addresses[owners == owner]
            self._touch_one(kind, int(owner), part, int(part.min()), int(part.max()), size)

    def _touch_one(self, kind: str, owner: int, addresses: np.ndarray, low: int, high: int, size: int) -> None:
        start, length = self.ranges[owner] if owner >= 0 else (0, 0)
        if owner < 0 or high + size > start + length:
            raise IndexError(f"{self.kernel}: a {kind} at an address outside every operand")
        access = self.accesses.get((kind, owner))
        if access is None:
            sectors = (start + length - 1) // SECTOR - start // SECTOR + 1
            access = self.accesses[kind, owner] = _Access(sectors)
        origin, base = low // SECTOR, start // SECTOR
        sectors = (addresses // np.uint64(SECTOR) - np.uint64(origin)).astype(np.int64)
        span = high // SECTOR - origin + 1
        if span <= 8 * len(sectors):  # marking is faster than sorting
            marks = np.zeros(span, dtype=bool)
            marks[sectors] = True
            access.touch(slice(origin - base, origin - base + span), marks, self.instructions)
            distinct = np.count_nonzero(marks)
        else:
            unique = np.unique(sectors)
            access.touch(unique + (origin - base), 1, self.instructions)
            distinct = len(unique)
        access.every += max(len(addresses) * size, distinct * SECTOR)

    def launch(self) -> Launch:
        moved = {kind: {self.names[owner]: access.moved(at_one_time=False)
                        for (k, owner), access in self.accesses.items() if k == kind} for kind in ("load", "store")}
        cached = sum(access.moved(at_one_time=True) for access in self.accesses.values())
        return Launch(self.kernel, moved["load"], moved["store"], cached)


def _bytes(x: Tensor) -> int:
    """Of the elements that x really has: an expanded dimension is one."""
    elements = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * x.element_size()


def _tensors(values) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def operation_bytes(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result) -> int:
    """Bytes that one plain torch operation moves, by the rule above."""
    name = function.overloadpacket.__name__
    if function.is_view or name in FREE:
        return 0
    inputs, outputs = _tensors((args, kwargs)), _tensors(result)
    if name in FACTORIES:
        return sum(map(_bytes, outputs))
    if name in GATHERS:
        return sum(map(_bytes, inputs[1:])) + 2 * sum(map(_bytes, outputs))
    if name in SCATTERS:
        source = _bytes(inputs[-1])
        scattered = sum(map(_bytes, inputs[1:])) + (1 if name == "index_copy_" else 2) * source
        # index_put is what autograd does to fresh zeros, in place on a GPU; index_add out of place copies first
        return scattered + (2 * _bytes(outputs[0]) if name == "index_add" else 0)
    schema = function._schema.arguments
    written = []
    for argument, value in zip(schema, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(value)
    written += [x for a in schema if a.alias_info is not None and a.alias_info.is_write for x in _tensors(kwargs.get(a.name))]
    if written:
        read = inputs
        if name in WRITTEN_ONLY or function._schema.overload_name.endswith("out"):
            read = [x for x in inputs if not any(x is w for w in written)]
        return sum(map(_bytes, read)) + sum(map(_bytes, written))
    storages = {x.untyped_storage()._cdata for x in inputs}
    outputs = [x for x in outputs if x.untyped_storage()._cdata not in storages]
    return sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)) if outputs else 0


class _Dispatch(TorchDispatchMode):
    """Counts plain torch operations into a Traffic."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic, self.paused = traffic, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused and isinstance(function, torch._ops.OpOverload):
            moved = operation_bytes(function, args, kwargs or {}, result)
            if moved:
                self.traffic.operations.append((function.overloadpacket.__name__, moved))
        return result


@contextmanager
def count_operations() -> Iterator[Traffic]:
    """Plain torch operations only; works with meta tensors, which compute nothing."""
    traffic = Traffic()
    with _Dispatch(traffic):
        yield traffic


@contextmanager
def count() -> Iterator[Traffic]:
    """Triton launches under the interpreter and plain torch operations between them."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()
    dispatch = _Dispatch(traffic)
    current: list[_Operands] = []
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    originals = {name: getattr(InterpreterBuilder, name) for name in names}  # the other forms end in these
    run, patch = GridExecutor.__call__, interpreter._patch_lang
    languages = {id(interpreter.tl), id(interpreter.tl.core)}

    def touch(kind: str, pointers, mask: np.ndarray) -> None:
        current[-1].touch(kind, pointers.data, mask, max(1, pointers.get_element_ty().primitive_bitwidth // 8))

    def load(builder, pointers, mask, *rest, **named):
        touch("load", pointers, mask.data)
        return originals["create_masked_load"](builder, pointers, mask, *rest, **named)

    def store(builder, pointers, value, mask, *rest):
        touch("store", pointers, mask.data)
        return originals["create_masked_store"](builder, pointers, value, mask, *rest)

    def atomic(builder, operation, pointers, value, mask, *rest):
        touch("load", pointers, mask.data)
        touch("store", pointers, mask.data)
        return originals["create_atomic_rmw"](builder, operation, pointers, value, mask, *rest)

    def compare(builder, pointers, *rest):
        everywhere = np.ones(pointers.data.shape, dtype=bool)
        touch("load", pointers, everywhere)
        touch("store", pointers, everywhere)
        return originals["create_atomic_cas"](builder, pointers, *rest)

    def launch(executor, *args, **kwargs):
        current.append(_Operands(executor.fn.__name__, {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}))
        dispatch.paused = True
        try:
            run(executor, *args, **kwargs)
        finally:
            dispatch.paused = False
            done = current.pop()
        traffic.launches.append(done.launch())

    def patch_once(function):  # the interpreter does it again for every call of a helper, which takes half of its time
        known = {id(value) for value in function.__globals__.values() if isinstance(value, ModuleType)} & languages
        if known <= current[-1].patched:
            return interpreter._LangPatchScope()
        current[-1].patched |= known
        return patch(function)

    replacements = dict(zip(names, (load, store, atomic, compare), strict=True))
    for name, replacement in replacements.items():
        setattr(InterpreterBuilder, name, replacement)
    GridExecutor.__call__, interpreter._patch_lang = launch, patch_once
    try:
        with dispatch:
            yield traffic
    finally:
        GridExecutor.__call__, interpreter._patch_lang = run, patch
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)
