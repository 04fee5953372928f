"""Training of LLaMA models, built from the `parallel` library. Start reading at `train.py`."""

__version__ = "0.1.0"
