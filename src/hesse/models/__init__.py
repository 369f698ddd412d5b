"""A network as a stream of blocks, and checkpoints on disk."""
