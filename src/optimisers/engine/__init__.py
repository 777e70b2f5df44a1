"""How a rule is carried over many arrays.

One step of a state tree (`tree_step`) goes down through these rooms, and what is new comes up again:

* `groups`: which parameters are stepped together, and their state; one step of a group;
* `graph`: a rule, traced once on values that stand for arrays, is a program of passes;
* `kernels`: a program, made by a backend for the device, is something that runs over a table of addresses;
* `memory`: where arrays lie, and to which memory results are written;
* `tracks`: arrays that are stepped by their rule itself, alone or on a stack, side by side with the groups;
* `eager`: programs for tensors that no kernels are made for.

`autograd` says when a step carries a graph, `torch_compile` records one inside ``torch.compile``.
"""
