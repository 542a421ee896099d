"""SwitchLoRA: replace single vectors of the adapters, a few at every step."""
