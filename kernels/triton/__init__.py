"""Triton realisations of the kernel specs: source generated per spec; triton is imported only to launch a kernel."""
