"""The torch-native train engine."""
