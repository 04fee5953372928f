"""A model-agnostic library of tensor, sequence, pipeline and data parallelism.

It knows tensors, groups, parameters and micro-batches, and never imports a model. Reading order: topology, groups,
collectives, shards, tensor/, pipeline/, zero/, checkpoint/.
"""
