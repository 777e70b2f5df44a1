"""The programs of tensors that no kernels are made for, computed by calls of torch on packed tensors."""
