"""Sign-based: the direction of each element counts, its size does not."""
