"""Memory errors and data races of interpreted Triton launches, found exactly.

Each tensor that a launch is given gets addresses of its own, 2⁴⁴ bytes from the next one's, so that an address says which
argument it was made from: one that runs out of its tensor into another is found too. A MemoryError names the kernel, unless

- every load and store touches elements of its own argument: of the view that was passed, not of its storage;
- every element is written by one program, and once by a store;
- no program reads an element that another one writes in the same launch: on a GPU they run at the same time;
- there is no atomic.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

APART, MIDDLE = 44, 1 << 43  # offsets are counted from the middle of an argument's addresses
MANY = -1


class _Argument:
    """One tensor of a launch."""

    def __init__(self, tensor: Tensor, traces: dict):
        self.tensor, self.size = tensor, tensor.element_size()
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        self.span = sum((length - 1) * stride for length, stride in lengths) + 1 if tensor.numel() else 0
        self.holes = None
        if self.span != tensor.numel():
            self.holes = np.ones(self.span, dtype=bool)
            strides = tensor.stride()
            np.lib.stride_tricks.as_strided(self.holes, tensor.shape, strides)[...] = False
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), self.size
        if key not in traces:  # which program reads and writes an element, + 1; in memory that stays untouched while it is 0
            traces[key] = [np.zeros(storage.nbytes() // self.size, dtype=np.int32) for _ in range(2)]
        self.readers, self.writers = traces[key]

    def elements(self, offsets: np.ndarray) -> np.ndarray:
        """Byte offsets as places in the storage."""
        places, rest = np.divmod(offsets, self.size)
        bad = (rest != 0) | (places < 0) | (places >= self.span)
        if self.holes is not None and not bad.any():
            bad = self.holes[places]
        if bad.any():
            raise MemoryError(f"touches place {places[bad][0]} of {list(self.tensor.shape)}, strides {self.tensor.stride()}")
        return places + self.tensor.storage_offset()

    def read(self, places: np.ndarray, program: int) -> None:
        writers = self.writers[places]
        if ((writers != 0) & (writers != program)).any():
            raise MemoryError("reads what another program of the launch has written")
        readers = self.readers[places]
        self.readers[places] = np.where((readers == 0) | (readers == program), program, MANY)

    def write(self, places: np.ndarray, program: int) -> None:
        if len(np.unique(places)) < len(places):
            raise MemoryError("writes an element twice in one store")
        for others, done in ((self.writers[places], "written"), (self.readers[places], "read")):
            if ((others != 0) & (others != program)).any():
                raise MemoryError(f"writes what another program of the launch has {done}")
        self.writers[places] = program


class _Launch:
    def __init__(self, kernel: str, names: dict):
        self.kernel, self.names, self.arguments, self.traces = kernel, names, [], {}

    def touch(self, kind: str, pointers: TensorHandle, mask: np.ndarray) -> TensorHandle:
        """Check an access; the pointers as they are in memory, 0 where masked off."""
        addresses, mask = np.broadcast_arrays(pointers.data, mask)
        mask = mask.astype(bool)
        real = np.zeros(addresses.shape, dtype=np.uint64)
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        owners = addresses >> np.uint64(APART)
        for owner in np.unique(owners[mask]).tolist():
            mine = mask & (owners == owner)
            if not 1 <= owner <= len(self.arguments):
                raise MemoryError(f"{self.kernel}: a {kind} at an address of no argument")
            argument = self.arguments[owner - 1]
            offsets = (addresses[mine] & np.uint64(2**APART - 1)).astype(np.int64) - MIDDLE
            try:
                places = argument.elements(offsets)
                getattr(argument, "read" if kind == "load" else "write")(places, (x * ny + y) * nz + z + 1)
            except MemoryError as error:
                tensor = argument.tensor
                name = self.names.get((tensor.data_ptr(), tensor.shape, tensor.stride()), "?")
                raise MemoryError(f"{self.kernel}, program {(x, y, z)}: a {kind} of {name} {error}") from None
            real[mine] = (offsets + argument.tensor.data_ptr()).astype(np.uint64)
        return TensorHandle(real, pointers.dtype)


@contextmanager
def checked() -> Iterator[list[str]]:
    """Inside, launches are checked; gives the names of the kernels launched."""
    launches, launched = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomics = {name: getattr(InterpreterBuilder, name) for name in ("create_atomic_rmw", "create_atomic_cas")}
    call, convert = GridExecutor.__call__, interpreter._implicit_cvt

    def checked_load(builder, pointers, mask, *rest, **named):
        return load(builder, launches[-1].touch("load", pointers, mask.data), mask, *rest, **named)

    def checked_store(builder, pointers, value, mask, *rest):
        return store(builder, launches[-1].touch("store", pointers, mask.data), value, mask, *rest)

    def no_atomics(*_):
        raise MemoryError(f"{launches[-1].kernel}: an atomic")

    def addressed(argument):
        if not isinstance(argument, Tensor):
            return convert(argument)
        launch, kind = launches[-1], convert(argument).dtype
        launch.arguments.append(_Argument(argument, launch.traces))
        address = (len(launch.arguments) << APART) + MIDDLE
        return tl.tensor(TensorHandle(np.array([address], dtype=np.uint64), kind), kind)

    def launch(executor, *args, **kwargs):
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        names = {(x.data_ptr(), x.shape, x.stride()): name for name, x in given.items() if isinstance(x, Tensor)}
        launches.append(_Launch(executor.fn.__name__, names))
        launched.append(executor.fn.__name__)
        try:
            return call(executor, *args, **kwargs)
        finally:
            launches.pop()

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    for name in atomics:
        setattr(InterpreterBuilder, name, no_atomics)
    GridExecutor.__call__, interpreter._implicit_cvt = launch, addressed
    try:
        yield launched
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        for name, function in atomics.items():
            setattr(InterpreterBuilder, name, function)
        GridExecutor.__call__, interpreter._implicit_cvt = call, convert
