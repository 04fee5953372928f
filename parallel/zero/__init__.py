"""Sharded optimizers behind one interface. Reading order: engine, buckets, grad_norm, native, post_validation."""
