"""The SGLang rollout engine: its server, started with our hooks, and how to speak to it."""
