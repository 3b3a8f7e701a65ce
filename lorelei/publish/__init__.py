"""Publishers: how a new adapter version reaches a rollout engine."""
