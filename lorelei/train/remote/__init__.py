"""Train engines in worker processes: the wire, the workers, restarts."""
