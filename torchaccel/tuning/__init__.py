"""Measured timings of kernels: keyed, kept in one file, looked up by the compiler, shipped in bundles."""
