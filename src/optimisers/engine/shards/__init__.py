"""Arrays cut over the ranks of a mesh: sums finished over ranks, and matrices put together where they are transformed."""
