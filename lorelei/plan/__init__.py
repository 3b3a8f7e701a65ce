"""What a run needs and where: memory, limits, tables."""
