"""What a run takes up: a meter of the live run, closed forms, and both beside each other."""
