"""Text to indexed datasets (`.bin`, `.idx`), and datasets to micro-batches whose order is a pure function."""
