"""The public functions name the argument that has a wrong dtype or lies on another device."""

from types import SimpleNamespace

import pytest
import torch

from scbench.kernels import backend
from scbench.kernels.add_norm import add_norm, dropout, relu_dropout
from scbench.kernels.attention import attention
from scbench.kernels.causal_conv import causal_conv
from scbench.kernels.gene_value_embedding import gene_value_embedding
from scbench.kernels.masked_regression import masked_regression
from scbench.kernels.mvc import mvc
from scbench.kernels.selective_scan import selective_scan
from scbench.kernels.table_rows import table_rows

INDEX, KEYS, OFFSETS = torch.arange(3).int(), torch.arange(3), torch.tensor([0, 3]).int()


def f(*shape):
    return torch.zeros(shape)


# The first is what the others are compared with.
CALLS = {
    table_rows: {"table": f(3, 2), "genes": INDEX, "gene_order": INDEX},
    gene_value_embedding: {"table": f(3, 2), "genes": INDEX, "values": f(3), "gene_order": INDEX, "weight1": f(2, 1),
                           "bias1": f(2), "weight2": f(2, 2), "bias2": f(2)},
    masked_regression: {"hidden": f(3, 2), "weight": f(1, 2), "bias": f(1), "targets": f(3)},
    mvc: {"queries": f(3, 2), "query_index": INDEX, "query_order": INDEX, "cell_embedding": f(3, 2), "cell_index": INDEX,
          "targets": f(3)},
    dropout: {"x": f(3, 2), "token_keys": KEYS, "probability": 0.5},
    relu_dropout: {"x": f(3, 2), "token_keys": KEYS, "probability": 0.5},
    add_norm: {"x": f(3, 2), "residual": f(3, 2), "weight": f(2), "bias": f(2), "token_keys": KEYS, "probability": 0.5},
    attention: {"query": f(3, 1, 2), "key": f(3, 1, 2), "value": f(3, 1, 2), "cell_offsets": OFFSETS,
                "key_lengths": OFFSETS[1:], "token_keys": KEYS, "probability": 0.5},
    causal_conv: {"x": f(3, 2), "weight": f(2, 4), "bias": f(2), "cell_offsets": OFFSETS},
    selective_scan: {"x": f(3, 2), "step": f(3, 2), "decay": f(2, 4), "input_matrix": f(3, 4), "output_matrix": f(3, 4),
                     "skip": f(2), "cell_offsets": OFFSETS},
}  # fmt: skip
ARGUMENTS = [(function, name) for function, arguments in CALLS.items() for name in arguments if name != "probability"]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_dtypes_and_devices_are_named(function, name):
    arguments = CALLS[function]
    function(**arguments)
    for wrong in ("int8", "bool", "bfloat16" if arguments[name] is INDEX or name in ("values", "targets") else "complex64"):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, not torch\.{wrong}$"):
            function(**{**arguments, name: arguments[name].to(getattr(torch, wrong))})
    expected = f"^{name} must be on cpu" if name != next(iter(arguments)) else "must be on meta"
    with pytest.raises(ValueError, match=expected):
        function(**{**arguments, name: arguments[name].to("meta")})


def test_weights_have_one_dtype():
    with pytest.raises(ValueError, match="weight2 must be float32"):
        gene_value_embedding(**{**CALLS[gene_value_embedding], "weight2": f(2, 2).double()})


def test_tensors_on_another_gpu_than_the_current_one(monkeypatch):
    """Triton launches on the current one."""
    monkeypatch.setattr(backend, "FORCED", "triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    on = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", number)) for number in range(2)]
    assert backend.use_triton(on[0])
    with pytest.raises(ValueError, match=r"tensors are on cuda:1, the current GPU is cuda:0: call torch.cuda.set_device"):
        backend.use_triton(on[1])
