"""Train engines, batches and the training step."""
