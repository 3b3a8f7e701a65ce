"""What a person sees of a run: progress, figures, samples. Reads records, never tensors."""
