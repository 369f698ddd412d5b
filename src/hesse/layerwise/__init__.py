"""Solve single layers: from a rule and statistics to a solution."""
