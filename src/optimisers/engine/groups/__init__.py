"""Parameters that are stepped together: what they have in common, their state, and one step of them."""
