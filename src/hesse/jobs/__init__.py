"""Jobs: the verbs on a checkpoint, one file per command."""
