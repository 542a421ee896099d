"""What a court is made of: contestants, the rule that tunes them, runs, records, the verdict."""
