"""How a rule is carried over many arrays: what happens in one step, in the order in which data passes.

1. `tree_step` is given parameters and gradients, one for each slot of a state tree; `autograd` says whether they carry a graph.
2. `groups` puts parameters with one kind of rule, dtype, form of state and device together, once; a `memory.guard` asks before
   each step whether they are still as they were. What fits no group is stepped by its rule (`tracks`).
3. `graph` traces the rule of a group, once for each kind: a program of passes over elements. Numbers are its inputs.
4. `kernels` makes of a program, by a backend for the device, what runs over a table of addresses and a matrix of numbers.
5. Groups and single arrays are `tracks`: each goes through its rule, stops where it needs a norm or a matrix transformed, and
   is resumed with it. All go side by side, so that a norm may be over arrays of any group. Checks are read at the end.
6. Nothing was written so far. `aliasing` has seen to it that no gradient lies where the last passes write: into old memory
   that nobody else refers to, or new memory (`memory`). `groups.states` is the new state; `tree_step` puts it into the tree.

`torch_compile` records such a step inside ``torch.compile``. The words for these things are explained in ``docs/design.md``.
"""
