"""The embedded inference engine: samples from the torch-native decoder on one thread."""
