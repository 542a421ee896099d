"""Kernels in Triton for tensors on a GPU; each is called beside its torch or C path."""
