"""Kernels for the host: C, compiled by the system's compiler and kept on disk."""
