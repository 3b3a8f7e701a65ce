"""What samples: the InferenceEngine contract and its three implementations."""
