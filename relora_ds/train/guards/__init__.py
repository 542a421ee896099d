"""What a run may believe, save and report: the checks between an update and its consequences."""
