"""The library in other surroundings: each part is imported only when it is asked for."""
