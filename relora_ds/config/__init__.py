"""What a run is: a frozen, validated description. Knows nothing of the other floors."""
