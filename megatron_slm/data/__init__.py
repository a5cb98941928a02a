"""From text to micro-batches: preprocessing, tokenizers, corpora, sample order, loading."""
