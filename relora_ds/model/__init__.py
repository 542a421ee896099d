"""The LLaMA model: norm, rotary positions, attention, MLP, loss, and what is known about them."""
