"""Everything that knows DeepSpeed 0.19.8: its keys, wrappers, partitions and files."""
