"""What a run will take up, move and need, computed without allocating anything."""
