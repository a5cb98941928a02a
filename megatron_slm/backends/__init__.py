"""What a process computes with: optional packages that work here, and the choice among them."""
