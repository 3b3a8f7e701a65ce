"""What runs inside SGLang's server processes, in SGLang's virtual environment.

Imports from lorelei only what needs packages of that environment: torch, numpy, safetensors and
starlette.
"""
