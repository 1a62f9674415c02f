"""Attention with wider values, a scale, pads and dropout, against a loop over tokens and the oracle beside it."""

import pytest
import torch

from scbench.kernels import random
from scbench.kernels.attention import attention, attention_oracle

F64 = torch.float64
LENGTHS, KEY_LENGTHS = [4, 1, 9, 2], [3, 1, 9, 1]
OFFSETS = torch.tensor([0, 4, 5, 14, 16], dtype=torch.int32)
PADS = torch.tensor(KEY_LENGTHS, dtype=torch.int32)
KEYS = random.bits_torch(7, torch.arange(16))
OPTIONS = {
    "wide values": {},
    "scale": {"scale": 1.0},
    "pads": {"key_lengths": PADS},
    "dropout": {"token_keys": KEYS, "probability": 0.4},
    "all": {"scale": 0.7, "key_lengths": PADS, "token_keys": KEYS, "probability": 0.4},
}


def draw(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def inputs(value_width=5):
    return draw(16, 2, 3, seed=0), draw(16, 2, 3, seed=1), draw(16, 2, value_width, seed=2)


def by_token(query, key, value, scale=3**-0.5, key_lengths=None, token_keys=None, probability=0.0):
    """One query token and one head at a time; every dropout decision from the generator's integers."""
    drop_below = round(probability * 65536)
    output = torch.zeros(16, 2, value.shape[2], dtype=F64)
    for cell, start in enumerate(OFFSETS[:-1].tolist()):
        n = int((OFFSETS.diff() if key_lengths is None else key_lengths)[cell])
        for t in range(start, start + LENGTHS[cell]):
            for h in range(2):
                weights = (scale * key[start : start + n, h] @ query[t, h]).exp()
                weights = weights / weights.sum()
                if token_keys is not None:
                    columns = [j * 2 + h for j in range(n)]
                    lanes = [random.fold(token_keys[t].item() % 2**64, c // 4) >> 16 * (c % 4) & 0xFFFF for c in columns]
                    kept = [(lane ^ 0x8000) >= drop_below for lane in lanes]  # read as signed
                    weights = weights * torch.tensor(kept) * 65536 / (65536 - drop_below)
                output[t, h] = weights @ value[start : start + n, h]
    return output


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_equal_the_definition(options):
    tensors = inputs()
    expected = by_token(*tensors, **options)
    torch.testing.assert_close(attention(*tensors, OFFSETS, **options), expected)
    torch.testing.assert_close(attention_oracle(*tensors, OFFSETS, **options), expected)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, OFFSETS, **options), leaves)
    upstream, grads = draw(16, 2, 5, seed=3), []
    for function in (attention, attention_oracle):
        grads.append(torch.autograd.grad((function(*leaves, OFFSETS, **options) * upstream).sum(), leaves))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pads_are_not_seen():
    query, key, value = inputs()
    expected = attention(query, key, value, OFFSETS, key_lengths=PADS)
    for pad in (3, 15):
        key[pad], value[pad] = 1e3, 1e3
    torch.testing.assert_close(attention(query, key, value, OFFSETS, key_lengths=PADS), expected)


def test_later_tokens_decide_nothing_about_what_is_dropped():
    query, key, value = inputs()
    alone = attention(query[:3], key[:3], value[:3], OFFSETS[:2].clamp(max=3), token_keys=KEYS[:3], probability=0.4)
    padded = attention(query, key, value, OFFSETS, key_lengths=PADS, token_keys=KEYS, probability=0.4)
    torch.testing.assert_close(padded[:3], alone)


@pytest.mark.parametrize("options", [{}, {"token_keys": None, "probability": 0.4}, {"token_keys": KEYS}])
def test_without_dropout_it_is_plain_attention(options):
    tensors = inputs(value_width=3)
    torch.testing.assert_close(attention(*tensors, OFFSETS, **options), attention_oracle(*tensors, OFFSETS))


def test_bf16_errs_no_more_than_plain_torch():
    options = OPTIONS["all"]
    results = []
    for function, dtype in ((attention, torch.bfloat16), (attention_oracle, torch.bfloat16), (attention_oracle, F64)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs()]
        output = function(*leaves, OFFSETS, **options)
        (output * draw(16, 2, 5, seed=3).bfloat16().to(dtype)).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(("changes", "named"), [
    ({"value": draw(15, 2, 3, seed=0)}, "query, key and value"),
    ({"key": draw(16, 2, 4, seed=0)}, "query, key and value"),
    ({"key_lengths": torch.tensor([4, 0, 9, 2])}, "key_lengths"),
    ({"key_lengths": torch.tensor([4, 2, 9, 2])}, "key_lengths"),
    ({"token_keys": KEYS[:15], "probability": 0.1}, "token_keys"),
])
def test_wrong_shapes_are_named(changes, named):
    query, key, value = inputs()
    with pytest.raises(ValueError, match=named):
        attention(**{"query": query, "key": key, "value": value, "cell_offsets": OFFSETS, **changes})
