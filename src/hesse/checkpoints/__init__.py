"""Files: checkpoints read and written, the output folder, resumable runs, tensors offloaded to disk."""
