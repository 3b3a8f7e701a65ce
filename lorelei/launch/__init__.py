"""What a run needs, and what starts it: a pure plan, and executors."""
