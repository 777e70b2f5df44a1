"""Adaptive: the gradient over a running measure of its size."""
