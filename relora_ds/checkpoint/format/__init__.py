"""What a checkpoint is on disk: names, contents by format number, and proof of completeness."""
