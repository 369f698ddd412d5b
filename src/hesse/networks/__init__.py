"""A network as blocks of linear layers, and what is known of architectures."""
