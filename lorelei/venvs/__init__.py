"""Virtual environments of what cannot share Lorelei's own: vLLM, SGLang, Megatron.

Standard library only.
"""
