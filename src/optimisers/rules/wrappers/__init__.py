"""Wrappers: rules made of other rules."""
