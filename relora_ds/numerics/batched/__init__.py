"""What an event does to all projections at once: by torch one by one, on a GPU in few launches."""
