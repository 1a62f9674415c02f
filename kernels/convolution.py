"""A layer's convolution and pool, both along the rows of cells that are padded to one length.

On a CPU in bf16 and fp32 without a transpose (convolution_cpu.py), elsewhere by torch's own operations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import convolution_cpu
from scbench.kernels.checks import FLOATS, check


def convolution_pool(
    states: Tensor, weight: Tensor, bias: Tensor, stride: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(convolution, largest of each `stride` rows) of the rows of cells.

    Sums in fp32 (fp64 for fp64 inputs). With an odd S the last row is pooled alone.

    Parameters
    ----------
    states
        [B, S, D]; the convolution sees zeros before and behind.
    weight, bias
        [E, D, K] with an odd K, and [E].
    stride
        1 or 2: output p stands where row stride · p is.
    lengths
        int [B]: rows that a cell has, None if all have S. The others must be zero; the pool leaves them out, and their
        gradient has no meaning.

    Returns
    -------
    [B, ⌈S / stride⌉, E] and [B, ⌈S / stride⌉, D], rows past ⌈length / stride⌉ without a meaning.
    """
    if (states.ndim != 3 or weight.ndim != 3 or weight.shape[1] != states.shape[2] or bias.shape != weight.shape[:1]
            or weight.shape[2] % 2 == 0 or stride not in (1, 2)):
        raise ValueError("states, weight, bias and stride must be [B, S, D], [E, D, odd K], [E] and 1 or 2, not "
                         f"{list(states.shape)}, {list(weight.shape)}, {list(bias.shape)} and {stride}")
    check(states.device, FLOATS, states=states)
    check(states.device, (states.dtype,), weight=weight, bias=bias)
    if states.shape[1] == 1:
        stride = 1  # the same; at 2 oneDNN 3.12 leaves the gradient of bf16 weights that see no row unwritten
    if convolution_cpu.takes(states):
        return convolution_cpu.CpuConvolutionPool.apply(states, weight, bias, lengths, stride)
    columns = states.transpose(1, 2)
    mixed = F.conv1d(columns, weight, bias, stride, weight.shape[2] // 2)
    if lengths is not None:
        past = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
        columns = columns.masked_fill(past[:, None], -torch.inf)
    return mixed.transpose(1, 2), F.max_pool1d(columns, stride, ceil_mode=True).transpose(1, 2)
