"""Numbers in few bits: moments in blocks of eight, weight changes on the wire in four to sixteen."""
