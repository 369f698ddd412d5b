"""Passes of data through a network: forward, with stops at layers, backward, and with per-sample gradients."""
