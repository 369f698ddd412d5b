"""The cost of changing or removing a part of a network."""
