"""From a rule to a program: what it computes, as passes over elements."""
