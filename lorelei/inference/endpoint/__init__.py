"""The loopback endpoint through which agents speak to a rollout engine as OpenAI clients do."""
