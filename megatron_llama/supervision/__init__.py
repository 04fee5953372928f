"""The supervisor's parts: what it knows of its ranks and of the other nodes, and what it says."""
