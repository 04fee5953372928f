"""Tensor and sequence parallel layers: mappings, linears, embedding, cross entropy, and the parameters they own."""
