"""Gradient descent: the gradient times a learning rate, with or without momentum."""
