"""The LLaMA model, built from the layers of `parallel.tensor`. Reading order: rope, attention, mlp, block, stage."""
