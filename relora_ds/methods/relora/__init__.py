"""ReLoRA: merge the adapters into the base, restart them, repeat."""
