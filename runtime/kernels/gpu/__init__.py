"""Triton kernels for GPUs, each beside its plain-torch twin. Nothing here is imported on a CPU."""
