"""Kernels by operation: a table resolved once at start, each operation with a plain-torch reference."""
