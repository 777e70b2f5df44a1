"""Limits: how large a gradient or a step may be."""
