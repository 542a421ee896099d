"""What a person looks at after a run: curves of several runs, spectra, a report."""
