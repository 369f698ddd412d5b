"""Run a checkpoint in other programs: export it, and time it there."""
