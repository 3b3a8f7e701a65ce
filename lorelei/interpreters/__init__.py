"""Virtual environments of what cannot share Lorelei's own: vLLM, SGLang. Standard library only."""
