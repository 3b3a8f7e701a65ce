"""Environments: what happens between a prompt and its reward."""
