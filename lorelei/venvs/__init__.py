"""Virtual environments for what conflicts with Lorelei's own dependencies: vLLM, SGLang, Megatron.

Standard library only.
"""
