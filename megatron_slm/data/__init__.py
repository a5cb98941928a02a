"""From text to micro-batches: tokenizers, the .bin/.idx corpus format, sample order, loading."""
