"""The Triton kernels, behind ``torch.ops.fastformer_triton``: one module per op, with the raw op and its backward."""
