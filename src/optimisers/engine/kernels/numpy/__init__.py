"""Programs run by NumPy on the host, where nothing is compiled."""
