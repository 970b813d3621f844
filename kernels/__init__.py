"""The operations that carry the model's arithmetic, each with a plain PyTorch reference."""
