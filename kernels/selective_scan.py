"""The selective state-space scan of Mamba inside each cell of a packed batch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_STEPS = 8  # time steps computed at once: their states fit the caches (measured: 4 to 16 are equally fast)


def _chunks(cell_offsets: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """The tokens CHUNK_STEPS places at a time: (token numbers, place by place; how many cells reach each place).

    The longest cell comes first, so the cells still running are the first rows of any place: no padding, no gaps.
    """
    lengths, cells = cell_offsets.diff().sort(descending=True, stable=True)
    starts = cell_offsets[:-1][cells]
    places = torch.arange(int(lengths[0]), device=cell_offsets.device)[:, None]
    running = places < lengths
    for tokens, still in zip((starts + places).split(CHUNK_STEPS), running.split(CHUNK_STEPS), strict=True):
        yield tokens[still], still.sum(1).tolist()


def _states(first: Tensor, x: Tensor, step: Tensor, decay: Tensor, inputs: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(factors exp(Δ A), states h), each [R, N, E], of a chunk's R tokens; `first` holds the states before it."""
    factors = torch.mul(step[:, None], decay).exp_()
    states = torch.mul(inputs[:, :, None], (step * x)[:, None])
    previous = first
    for factor, state in zip(factors.split(counts), states.split(counts), strict=True):
        state.addcmul_(factor, previous[: len(state)])
        previous = state
    return factors, states


class _SelectiveScan(torch.autograd.Function):
    """Saves its inputs and the states between chunks; the backward computes the others again, chunk by chunk."""

    @staticmethod
    def forward(ctx, x, step, decay, inputs, outputs, skip, cell_offsets) -> Tensor:
        dtype = step.dtype
        decays = decay.T.to(dtype).contiguous()  # [N, E]: whole rows of channels
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = decays.new_zeros(len(cell_offsets) - 1, *decays.shape)
        ctx.chunks = []
        for tokens, counts in _chunks(cell_offsets):
            state = state[: counts[0]].clone()
            ctx.chunks.append((tokens, counts, state))
            chunk_x, chunk_step, b, c = (v.index_select(0, tokens).to(dtype) for v in (x, step, inputs, outputs))
            _, states = _states(state, chunk_x, chunk_step, decays, b, counts)
            chunk_y = torch.bmm(c[:, None], states)[:, 0].addcmul_(chunk_x, skip.to(dtype))
            y.index_copy_(0, tokens, chunk_y.to(y.dtype))
            state = states[-counts[-1] :]
        ctx.save_for_backward(x, step, decay, inputs, outputs, skip)
        return y
