"""Trees: leaves, paths, ties, absent gradients, and the state tree. The only part that imports optree."""
