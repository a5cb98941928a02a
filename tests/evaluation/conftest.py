"""Fixtures shared with the analyses: tiny models and texts."""

from tests.analysis.conftest import *  # noqa: F403
