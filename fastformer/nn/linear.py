"""Linear: torch.nn.Linear on the fused op."""

from __future__ import annotations

from torch import Tensor, nn

from fastformer import ops


class Linear(nn.Linear):
    """``input @ weight.T + bias``: a drop-in for torch.nn.Linear, with its arguments and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) in the weight's dtype. Returns (..., out_features). Errors: :func:`ops.linear`."""
        return ops.linear(input, self.weight, self.bias)
