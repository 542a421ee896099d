"""What a step costs: counted collectives, and closed forms of bytes, memory and FLOPs."""
