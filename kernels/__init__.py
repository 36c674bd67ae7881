"""Generated kernels: one frozen spec, three realisations (PyTorch reference, C++ for CPUs, Triton for GPUs)."""
