"""What became of a run, for people: its state, and pictures of its clips."""
