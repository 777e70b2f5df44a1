"""Decay: what pulls parameters towards zero."""
