"""The train engine `fsdp`: any causal language model of transformers over many processes."""
