"""The train engine on Megatron-Core and Megatron-Bridge; runs in a separate virtual environment."""
