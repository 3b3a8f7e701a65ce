"""The embedded rollout engine: samples from the torch-native decoder on one thread."""
