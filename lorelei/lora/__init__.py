"""LoRA: targets, layers and the bank of adapters, PEFT-format tensors. No torch at load."""
