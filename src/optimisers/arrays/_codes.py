"""Arrays in 8 bits: a code for each element, and a scale for each block of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._elementwise import maximum, sign, sqrt, where, zeros
from ._kinds import Array, cast_to, dtype_name, namespace, working_dtype
from ._reductions import concatenate


def encoded(x: Array, block: int, *, linear: bool) -> tuple[Array, Array]:
    """A real array as int8 codes of its shape and a scale for each block of its elements in order, of its working dtype.

    In a block with a negative element, whose scale is stored as a negative number, code c stands for ``c |c| / 127**2`` of the
    scale; in another one ``((c + 128) / 255)**4``, and no positive element is coded as 0, so that second moments may be divided
    by. Linear codes stand for ``c / 127`` and ``(c + 128) / 255``. A block with an infinite or NaN element is all NaN.
    """
    flat = cast_to(x, working_dtype(dtype_name(x))).reshape((-1,))
    count = flat.shape[0]
    rest = -count % block
    blocks = (concatenate([flat, zeros(flat, (rest,))], axis=0) if rest else flat).reshape((-1, block))
    torch_is = not isinstance(blocks, np.ndarray)
    top = abs(blocks).amax(1) if torch_is else abs(blocks).max(axis=1, initial=0.0)
    negative = (blocks.amin(1) if torch_is else blocks.min(axis=1, initial=0.0)) < 0
    ratio = blocks / where(top > 0, top, 1 + 0 * top)[:, None]
    ratio = where(ratio == ratio, ratio, 0.0)  # noqa: PLR0124 (NaN, also as the ratio of infinities)
    size = abs(ratio)
    xp: Any = namespace(blocks)
    signed = xp.round(127 * (size if linear else sqrt(size))) * sign(ratio)
    unsigned = where(ratio > 0, maximum(xp.round(255 * (size if linear else sqrt(sqrt(size)))), 1.0), 0.0) - 128
    codes = cast_to(where(negative[:, None], signed, unsigned), "int8").reshape((-1,))[:count]
    return codes.reshape(x.shape), where(negative, -top, top)


def decoded(codes: Array, scales: Array, block: int, *, linear: bool) -> Array:
    """The array of these codes and scales, in the dtype of the scales."""
    flat = cast_to(codes, dtype_name(scales)).reshape((-1,))
    count = flat.shape[0]
    rest = -count % block
    c = (concatenate([flat, zeros(flat, (rest,))], axis=0) if rest else flat).reshape((-1, block))
    part, above = c / 127, (c + 128) / 255
    if not linear:
        part, above = part * abs(part), above * above * (above * above)
    scale = scales[:, None]
    return where(scale < 0, part * -scale, above * scale).reshape((-1,))[:count].reshape(codes.shape)
