"""Kernels for CUDA: a program becomes source, NVRTC compiles it, the driver launches it over tables of addresses."""
