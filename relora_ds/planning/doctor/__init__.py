"""What stands between a machine and a run: checks that end in a finding and a remedy each."""
