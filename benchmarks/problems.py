"""The models that are stepped: names and shapes, filled with random numbers."""

from itertools import pairwise

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2's 148 arrays, 124 million numbers."""
    width = 768
    shapes: Shapes = {"transformer.wte.weight": (50257, width), "transformer.wpe.weight": (1024, width)}
    for i in range(12):
        block = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        layers = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
        for layer, (rows, columns) in layers.items():
            shapes |= {f"{block}.{layer}.weight": (rows * width, columns * width), f"{block}.{layer}.bias": (rows * width,)}
    return shapes | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


def many() -> Shapes:
    """2,000 leaves: 1,000 small matrices, each with its vector."""
    return {f"layers.{i}.{name}": shape for i in range(1000) for name, shape in (("weight", (64, 64)), ("bias", (64,)))}


def mlp() -> Shapes:
    """A small network of 6 leaves."""
    widths = (784, 128, 64, 10)
    shapes: Shapes = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        shapes |= {f"layers.{i}.weight": (after, before), f"layers.{i}.bias": (after,)}
    return shapes


def tiny() -> Shapes:
    """Six leaves of a network so small that a step is all overhead."""
    return {f"layers.{i}.{name}": shape for i in range(3) for name, shape in (("weight", (32, 32)), ("bias", (32,)))}


def small_matrices() -> Shapes:
    """50 matrices of at most 64 x 16."""
    return {f"matrix.{i}": ((64, 16), (32, 16), (16, 16), (48, 8))[i % 4] for i in range(50)}


def small_vectors() -> Shapes:
    """98 vectors, as biases and norms beside such matrices."""
    return {f"vector.{i}": (64,) if i % 2 else (16,) for i in range(98)}


def equal_leaves(count: int) -> Shapes:
    """So many leaves of 1,000 elements."""
    return {f"leaf.{i}": (1000,) for i in range(count)}


def transformer_matrices() -> Shapes:
    """The matrices of six small transformer blocks."""
    layers = {"qkv": (1152, 384), "out": (384, 384), "up": (1536, 384), "down": (384, 1536)}
    return {f"h.{i}.{layer}": shape for i in range(6) for layer, shape in layers.items()}


def square_matrices() -> Shapes:
    return {f"matrix.{i}": (128, 128) for i in range(200)}


def long_matrices() -> Shapes:
    return {f"matrix.{i}": (256, 4096) for i in range(4)}


PROBLEMS = {f.__name__: f for f in (gpt2, many, mlp, transformer_matrices, square_matrices, long_matrices)}


def size(shapes: Shapes) -> int:
    """How many numbers."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def arrays(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
