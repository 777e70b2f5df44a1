"""Arrays in 8 bits: a code for each element, and a scale for each block of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._elementwise import maximum, sign, sqrt, where, zeros
from ._host import can_read
from ._kinds import Array, cast_to, dtype_name, namespace, working_dtype
from ._matrices import on_cpu
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

    def signed() -> Array:
        return xp.round(127 * (size if linear else sqrt(size))) * sign(ratio)

    def unsigned() -> Array:
        return where(ratio > 0, maximum(xp.round(255 * (size if linear else sqrt(sqrt(size)))), 1.0), 0.0) - 128

    codes = cast_to(_by_sign(negative, signed, unsigned), "int8").reshape((-1,))[:count]
    return codes.reshape(x.shape), where(negative, -top, top)


def decoded(codes: Array, scales: Array, block: int, *, linear: bool) -> Array:
    """The array of these codes and scales, in the dtype of the scales."""
    flat = cast_to(codes, dtype_name(scales)).reshape((-1,))
    count = flat.shape[0]
    rest = -count % block
    c = (concatenate([flat, zeros(flat, (rest,))], axis=0) if rest else flat).reshape((-1, block))
    scale = scales[:, None]

    def signed() -> Array:
        part = c / 127
        return (part if linear else part * abs(part)) * -scale

    def unsigned() -> Array:
        above = (c + 128) / 255
        if not linear:
            above = above * above
            above = above * above
        return above * scale

    return _by_sign(scales < 0, signed, unsigned).reshape((-1,))[:count].reshape(codes.shape)


def _by_sign(negative: Array, signed: Callable[[], Array], unsigned: Callable[[], Array]) -> Array:
    """What blocks with a negative element are, and what others are; both are computed only where some block needs each.

    A whole moment is mostly one of the two, and that can be read on the CPU at no cost.
    """
    if can_read(negative) and on_cpu(negative):
        count = int(negative.sum())
        if count in {0, negative.shape[0]}:
            return signed() if count else unsigned()
    return where(negative[:, None], signed(), unsigned())
