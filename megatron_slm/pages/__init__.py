"""HTML pages and charts, without network."""
