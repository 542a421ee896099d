"""How the processes of a run begin, watch each other, are asked to stop, fail and leave.

`launcher`, `requests`, `failure` and `lock` import nothing heavy: a process listens from its first
lines, before it has libraries.
"""
