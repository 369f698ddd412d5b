"""Plain linear algebra: solving, eigenvalues and traces from products alone, triangular matrices, estimates."""
