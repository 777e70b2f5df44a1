"""Where arrays lie, and who may write where."""
