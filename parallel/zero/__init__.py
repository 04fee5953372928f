"""Sharded optimizers behind one interface.

Reading order: engine, support; buckets, traffic, grad_norm, storage, loss_scale, update, native, post_validation;
deepspeed_setup, deepspeed_parts, deepspeed_engine.
"""
