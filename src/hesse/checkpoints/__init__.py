"""Files: read and write checkpoints, output folders and resumable runs, and offload tensors to disk."""
