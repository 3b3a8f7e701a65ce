"""The vLLM rollout engine: what is said to the server, and what runs inside it."""
