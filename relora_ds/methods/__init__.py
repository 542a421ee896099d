"""Training methods behind one seam: what each one builds, trains, merges, switches and resets."""
