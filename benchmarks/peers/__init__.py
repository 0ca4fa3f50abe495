"""Other toolkits on the same sentences with the same weights. `python -m benchmarks.peers --help` runs them all."""
