"""Helpers of the Triton tests: cases, the interpreter's bfloat16, compiling for absent devices."""
