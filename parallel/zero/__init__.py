"""Sharded optimizers behind one interface. Reading order: buckets, grad_norm, native."""
