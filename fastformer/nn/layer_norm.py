"""LayerNorm: torch.nn.LayerNorm on the fused op, with the residual that a transformer adds before it."""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn

from fastformer import ops


class LayerNorm(nn.LayerNorm):
    """``(input - mean) / sqrt(variance + eps) * weight + bias``: a drop-in for torch.nn.LayerNorm.

    Arguments and state_dict are those of torch.nn.LayerNorm (Ba et al., "Layer Normalization", 2016).
    """

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]: ...

    def forward(self, input, residual=None, dropout_p=0.0):
        """With a residual: "Add & Norm" in one pass, ``s = dropout(input) + residual``; returns ``(layer_norm(s), s)``.

        Args:
            input: (..., *normalized_shape); float32, bfloat16, float16 or float64; any strides.
            residual: input's shape; any of these dtypes. A post-norm block goes on with the first of the two results, a
                pre-norm block with both.
            dropout_p: dropout of the input before the addition, on where > 0 whether or not the module is in training.

        Returns:
            input's shape and dtype; with a residual two tensors in the wider of the two dtypes.

        Raises:
            TypeError, ValueError: as :func:`ops.layer_norm`, :func:`ops.add_layer_norm`; dropout_p without a residual.
        """
        if residual is not None:
            return ops.add_layer_norm(
                input, residual, self.normalized_shape, self.weight, self.bias, self.eps, dropout_p=dropout_p
            )
        if dropout_p:
            raise ValueError(f"dropout_p: expected 0 without a residual, got {dropout_p}")
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
