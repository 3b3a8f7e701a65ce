"""The train engine on Megatron-Core and Megatron-Bridge; runs in an interpreter of its own."""
