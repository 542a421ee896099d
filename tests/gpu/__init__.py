"""The cases of `tools/gpu_report.py`, one test each; they need a GPU."""
