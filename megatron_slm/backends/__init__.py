"""Optional packages that work here, and the choice among them."""
