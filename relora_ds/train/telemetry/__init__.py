"""What a run reports about itself, and where: metrics, progress, logs, summary and plots.

`telemetry.Telemetry` is the one object the training loop talks to; everything else is a part of it
or a tool around it. Nothing here takes part in a collective, so a rank may do less than another.
"""
