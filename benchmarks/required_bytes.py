"""Bytes that each op must move, forward and backward, by the meter's rule, as its docstring derives them."""

from kernel_inputs import Case
from torch import Tensor


def required(case: Case) -> tuple[int, int]:
    """(forward, backward) bytes of a case."""
    return FORMULAS[case.op](**case.arguments)


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _rows(table: Tensor, genes: Tensor) -> int:
    """Bytes of the rows that occur."""
    return len(genes.unique()) * table.shape[1] * table.element_size()


def _gene_value_embedding(genes, values, gene_order, table, weight1, bias1, weight2, bias2) -> tuple[int, int]:
    states = len(genes) * table.shape[1] * table.element_size()
    weights = _size(weight1, bias1, weight2, bias2)
    forward = _size(genes, values) + _rows(table, genes) + weights + states
    return forward, states + _size(genes, values, gene_order) + _size(table) + 2 * weights


def _table_rows(table, genes, gene_order) -> tuple[int, int]:
    states = len(genes) * table.shape[1] * table.element_size()
    return _size(genes) + _rows(table, genes) + states, states + _size(genes, gene_order) + _size(table)


def _masked_regression(hidden, weight, bias, targets) -> tuple[int, int]:
    """hidden is read twice: once for the predictions, once for the weight's gradient."""
    parameters = _size(weight, bias)
    return _size(hidden, targets) + parameters + 4 * len(targets), 2 * _size(hidden) + 8 * len(targets) + 2 * parameters


def _mvc(queries, query_index, cell_embedding, cell_index, targets) -> tuple[int, int]:
    rows, indices = _size(queries, cell_embedding), _size(query_index, cell_index)
    return rows + indices + _size(targets) + 4 * len(targets), 2 * rows + indices + 8 * len(targets)


def _dropout(x, token_keys, probability) -> tuple[int, int]:
    return (2 * _size(x) + _size(token_keys),) * 2


def _relu_dropout(x, token_keys, probability) -> tuple[int, int]:
    """Backward: the gradient, and x or the output, whose sign decides."""
    return 2 * _size(x) + _size(token_keys), 3 * _size(x) + _size(token_keys)


def _add_norm(x, residual, weight, bias, token_keys, probability) -> tuple[int, int]:
    """Two statistics a token in fp32 are kept. Backward: the gradient and what is normalised in, two gradients out."""
    statistics = 8 * len(x)
    forward = 3 * _size(x) + _size(weight, bias, token_keys) + statistics
    return forward, 5 * _size(x) + 2 * _size(weight) + _size(bias, token_keys) + statistics


def _attention(query, key, value, cell_offsets, **options) -> tuple[int, int]:
    """Forward: one fp32 log-sum a query and head is kept. Backward: q, k, v, the output and its gradient in."""
    logarithms = 4 * query.shape[0] * query.shape[1]
    keys = _size(options["token_keys"]) if "token_keys" in options else 0
    inputs = _size(query, key, value)
    return inputs + _size(value) + logarithms + keys, 2 * inputs + 2 * _size(value) + logarithms + keys


def _selective_scan(x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> tuple[int, int]:
    inputs = _size(x, step, decay, input_matrix, output_matrix, skip)
    return inputs + _size(x), 2 * inputs + _size(x)


def _causal_conv(x, weight, bias, cell_offsets) -> tuple[int, int]:
    return 2 * _size(x) + _size(weight, bias), 3 * _size(x) + 2 * _size(weight) + _size(bias)


FORMULAS = {
    "gene_value_embedding": _gene_value_embedding, "table_rows": _table_rows, "masked_regression": _masked_regression,
    "mvc": _mvc, "dropout": _dropout, "add_norm": _add_norm, "relu_dropout": _relu_dropout, "attention": _attention,
    "attention_dropout": _attention, "gene_graph": _attention, "selective_scan": _selective_scan, "causal_conv": _causal_conv,
}
