"""Other people's checkpoint formats, to and from ours. Reading order: stored_model, native, then a format."""
