"""Prompt sources: endless training problems by index, and a fixed held-out set."""
