"""What adapters are trained by: one file a kind of job."""
