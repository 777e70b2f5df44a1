"""Matrices: what is done to a matrix as a whole."""
