"""The torch-native decoder, shared by the archon train engine and the embedded rollout engine."""
