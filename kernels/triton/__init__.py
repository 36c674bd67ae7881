"""Triton realisations of the kernel specs: source generated per spec, triton imported only when a kernel is launched."""
