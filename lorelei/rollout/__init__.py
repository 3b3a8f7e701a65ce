"""Rollout engines, the collector and its admission."""
