"""Everything that knows the files of a saved run."""
