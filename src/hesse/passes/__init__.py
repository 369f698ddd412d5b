"""Data through a network: forward, stopping at layers, backward, per-sample gradients."""
