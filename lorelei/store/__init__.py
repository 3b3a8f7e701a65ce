"""The run folder: durable writes, manifests, checkpoints, index."""
