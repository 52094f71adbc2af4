"""What `scripts/bench` runs: one module for each benchmark."""
