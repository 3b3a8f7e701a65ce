"""The vLLM engine: how its servers are started, and what runs inside them."""
