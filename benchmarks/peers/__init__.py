"""Code of others, timed beside ours: what the user has of it is loaded from their own trees."""
