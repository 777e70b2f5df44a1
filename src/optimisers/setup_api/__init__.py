"""The verbs: one a file, thin."""
