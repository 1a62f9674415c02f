"""What the public functions ask of their arguments' dtypes, devices and indices."""

import torch
from torch import Tensor

from scbench.kernels import backend

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUES = (torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def check(device: torch.device, dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """ValueError naming the tensor unless each is on `device` in one of the dtypes."""
    for name, x in tensors.items():
        if x.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be {allowed}, not {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device}, as the other arguments, not on {x.device}")


def check_order(index_name: str, index: Tensor, order_name: str, order: Tensor, n_rows: int) -> None:
    """ValueError unless the indices are rows and the order sorts them. Waits for the device: for backend.DEBUG."""
    if len(index) and not (index.min() >= 0 and index.max() < n_rows):
        raise ValueError(f"{index_name} holds numbers outside 0 … {n_rows - 1}")
    if not torch.equal(order.long().sort().values, torch.arange(len(index), device=index.device)):
        raise ValueError(f"{order_name} must hold each token once")
    if (index[order.long()].diff() < 0).any():
        raise ValueError(f"{order_name} must sort {index_name}")


def check_offsets(cell_offsets: Tensor, tokens: int) -> None:
    """ValueError unless these are offsets [B+1] and, on a CPU or with backend.DEBUG, ascend from 0 to `tokens`."""
    if cell_offsets.ndim != 1 or not len(cell_offsets):
        raise ValueError(f"cell_offsets must be [B+1], not {list(cell_offsets.shape)}")
    if cell_offsets.device.type != "cpu" and not backend.DEBUG:
        return  # reading numbers would make the host wait
    first, last = int(cell_offsets[0]), int(cell_offsets[-1])
    if (first, last) != (0, tokens) or (cell_offsets.diff() < 0).any():
        raise ValueError(f"cell_offsets must ascend from 0 to the {tokens} tokens of the batch, not from {first} to {last}")
