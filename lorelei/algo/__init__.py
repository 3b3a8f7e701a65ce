"""Advantages, ratio losses and aggregations: pure functions; an algorithm is a preset of them."""
