"""The decoder's small operations as fused C kernels for fp32 on a CPU, and how they are built."""
