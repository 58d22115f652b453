"""Kernels in C of what a decoder computes beside its matrix products, on a CPU in bf16."""
