"""Gradients: what is done to a gradient before a rule sees it."""
