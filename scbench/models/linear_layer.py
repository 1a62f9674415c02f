"""torch's linear layer through our product."""

from torch import Tensor, nn

from scbench.kernels.add_norm import relu_dropout
from scbench.kernels.linear import linear, linear_relu


class Linear(nn.Linear):
    """y = W x + b; parameters as in nn.Linear."""

    def forward(self, states: Tensor) -> Tensor:
        """[…, D] → […, E]."""
        return linear(states, self.weight, self.bias)

    def relu_dropout(self, states: Tensor, token_keys: Tensor | None, probability: float) -> Tensor:
        """dropout(relu(y)); states [T, D] → [T, E]."""
        if token_keys is None or probability == 0:
            return linear_relu(states, self.weight, self.bias)
        return relu_dropout(self(states), token_keys, probability)
