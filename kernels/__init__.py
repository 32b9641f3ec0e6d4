"""Triton kernels for GPUs, one module per op."""
