"""Numbers in few bits: moments in blocks of eight, changes on the wire in four to sixteen."""
