"""What runs inside SGLang's server processes, under SGLang's own interpreter.

Imports from lorelei only what that interpreter has the packages for: torch, numpy, safetensors.
"""
