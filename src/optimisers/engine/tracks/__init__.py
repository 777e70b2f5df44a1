"""One array on its way through its rule, alone or on a stack, side by side with others."""
