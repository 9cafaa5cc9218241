"""Kernels for NVIDIA GPUs, in Triton: the ops' in `gptq.py` and `int8.py`, with `tune.py`, which chooses among their configurations, and
those of quantizing in `columns.py`.

Importing this package imports nothing; importing its modules imports Triton, which `kernels/cuda_ops.py` does at an op's first call on
a GPU. The launchers take tensors of any device that Triton computes on, so that its interpreter (TRITON_INTERPRET=1, set before
Triton is imported) runs the same kernels on a CPU: that is how the tests see them without a GPU.
"""
