"""GaLore: training within a subspace that the gradient chooses again and again."""
