"""Scorers, and the worker pool that runs them under a deadline."""
