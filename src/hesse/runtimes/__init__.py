"""Runtimes: export a checkpoint to other programs, and time it in them."""
