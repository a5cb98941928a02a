"""Configuration of a run: one frozen dataclass per section, and their parser.

Import each name from its module (`megatron_slm.config.run`, `megatron_slm.config.architecture`, ...).
"""
