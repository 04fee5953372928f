"""The real program on meta tensors: what a run of any size will allocate, send and compute."""
