"""Triton kernels, one stem per operation as in csrc; only ``backends.triton`` imports them."""
