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
    """The forward pass makes the weight's gradient too, so hidden is read once; kept are the predictions."""
    tokens = 8 * len(targets)
    return _size(hidden, weight) + tokens, _size(hidden) + tokens + 2 * _size(weight) + 4 * weight.numel()


def _mvc(queries, query_index, query_order, cell_embedding, cell_index, targets) -> tuple[int, int]:
    """The forward pass makes the cell embedding's gradient too, in fp32; it need not read every token's cell."""
    rows = _size(queries, cell_embedding) + 4 * cell_embedding.numel()
    tokens = _size(query_index) + 8 * len(targets)
    return rows + tokens, rows + _size(cell_embedding) + tokens + _size(query_order, cell_index)


def _dropout(x, token_keys, probability) -> tuple[int, int]:
    return (2 * _size(x) + _size(token_keys),) * 2


def _relu_dropout(x, token_keys, probability) -> tuple[int, int]:
    """Backward: the output says what was kept, no keys."""
    return 2 * _size(x) + _size(token_keys), 3 * _size(x)


def _add_norm(x, residual, weight, bias, token_keys, probability) -> tuple[int, int]:
    """Backward: the gradient, x and residual in, two gradients out; the statistics are computed again."""
    return 3 * _size(x) + _size(weight, bias, token_keys), 5 * _size(x) + 2 * _size(weight) + _size(bias, token_keys)


def _attention(query, key, value, cell_offsets, **options) -> tuple[int, int]:
    """Forward: two fp32 numbers a query and head are kept. Backward: q, k, v, the output and its gradient in."""
    statistics = 8 * query.shape[0] * query.shape[1]
    keys = _size(options["token_keys"]) if "token_keys" in options else 0
    inputs = _size(query, key, value)
    return inputs + _size(value) + statistics + keys, 2 * inputs + 2 * _size(value) + statistics + keys


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
