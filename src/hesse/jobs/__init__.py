"""The verbs on a checkpoint, one file a command."""
