"""One layer: from its rule and its statistics to a solution."""
