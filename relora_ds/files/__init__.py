"""Files as such: what may be opened, how tensors are written, and scratch folders that clean up."""
