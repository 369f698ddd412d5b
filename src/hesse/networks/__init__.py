"""Networks as lists of blocks of linear layers, and the tables of architectures."""
