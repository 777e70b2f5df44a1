"""Keys of random streams: the same for the same seed and path, on every machine."""

from __future__ import annotations

from hashlib import blake2b


def stream_key(name: str) -> int:
    """A signed 64-bit key for the stream of this name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
