"""Command lines and YAML files into a configuration; flags of Megatron-LM and misspelled ones get an answer."""
