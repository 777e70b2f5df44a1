"""Random numbers from counters."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from typing import Any

import numpy as np

from ._host import can_read, is_concrete, is_plain
from ._kinds import Array, cast_to, dtype_name, namespace, real_dtype
from ._matrices import on_cpu
from ._reductions import concatenate

# SplitMix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195) as a counter-based stream: the i-th number
# is a mixture of key + i * gamma, so that it can be computed anywhere, in any order, from array arithmetic alone.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shifted(z: Array, bits: int) -> Array:
    """z >> bits without the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Array) -> Array:
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def random_bits(key: Any, counter: Any, count: int, like: Array) -> Array:
    """So many random 64-bit numbers as an int64 vector, a pure function of (key, counter): the same on every device.

    Args:
        key: 64-bit ints, or 0-d int64 arrays. The result lies on the device of ``like``.
        counter: 64-bit ints, or 0-d int64 arrays. The result lies on the device of ``like``.

    """
    if isinstance(like, np.ndarray):
        index = np.arange(count, dtype=np.int64)
        seed, step = np.full((1,), key, np.int64), np.full((1,), counter, np.int64)
    else:
        torch = sys.modules["torch"]
        index = torch.arange(count, dtype=torch.int64, device=like.device)
        seed, step = (torch.as_tensor(v, dtype=torch.int64, device=like.device).reshape(1) for v in (key, counter))
    with np.errstate(over="ignore"):
        start = _mixed(seed ^ _mixed((step + 1) * _GAMMA))
        return _mixed(start + index * _GAMMA)


def normal(key: Any, counter: Any, shape: tuple[int, ...], like: Array) -> Array:
    """Independent standard normal float64 numbers, a pure function of (key, counter) as `random_bits`."""
    count = math.prod(shape)
    xp: Any = namespace(like)
    bits = random_bits(key, counter, (count + 1) // 2, like)
    # One 64-bit number makes two uniform ones, and by Box and Muller's method two normal ones.
    high, low = (cast_to(part, "float64") for part in (_shifted(bits, 32), bits & 0xFFFFFFFF))
    radius = xp.sqrt(-2 * xp.log((high + 0.5) / 2.0**32))
    angle = low * (2 * math.pi / 2.0**32)
    both = concatenate([radius * xp.cos(angle), radius * xp.sin(angle)], axis=0)
    return both[:count].reshape(shape)


_RECENT = 2**26
"""Numbers that are kept between uses, on all devices together."""

_recent: OrderedDict[Any, tuple[Any, Array]] = OrderedDict()


def recent_normal(key: Any, counter: Any, shape: tuple[int, ...], like: Array) -> Array:
    """As `normal`, in the precision of ``like``.

    On devices other than the host, where making them takes some sixty launches, the numbers of a key are kept until another
    counter is asked for; those that were used last, if there are many keys.
    """
    dtype = real_dtype(dtype_name(like))
    if not (type(key) is int and type(counter) is int and not on_cpu(like) and is_plain(like) and can_read(like)):
        return cast_to(normal(key, counter, shape, like), dtype)
    torch = sys.modules["torch"]
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.device.type == "cuda" else 0
    place = key, shape, dtype, str(like.device), stream, torch.is_inference_mode_enabled()
    known = _recent.get(place)
    if known is None or known[0] != counter:
        known = _recent[place] = counter, cast_to(normal(key, counter, shape, like), dtype)
    _recent.move_to_end(place)
    while len(_recent) > 1 and sum(math.prod(at[1]) for at in _recent) > _RECENT:
        _recent.popitem(last=False)
    return known[1]


def rounded_at_random(x: Array, key: Any, counter: Any) -> Array:
    """A float32 tensor rounded to one of the two nearest bfloat16 numbers at random, the mean being x; still float32.

    The random numbers are a pure function of (key, counter) and an element's place. Infinity and NaN are kept. The
    derivative is that of x.
    """
    torch = sys.modules["torch"]
    count = math.prod(x.shape)
    noise = random_bits(key, counter, (count + 3) // 4, x).view(torch.int16)[:count].reshape(x.shape)
    start = x.detach()
    # bfloat16 is the upper half of float32: a number below 2**16 added to the lower half carries with its probability.
    rounded = ((start.view(torch.int32) + 0x8000 + noise) & -0x10000).view(torch.float32)
    finite = start - start == 0
    if is_concrete(x):
        return torch.where(finite, rounded, x)
    return x + torch.where(finite, rounded - start, 0)
