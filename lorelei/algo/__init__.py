"""Algorithms, one a file: settings, credit, streams and loss. No torch at load."""
