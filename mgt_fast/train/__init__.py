"""Training: run configuration, batches, the loop, and the two tasks it runs."""
