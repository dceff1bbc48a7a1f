"""Configurations for ``lightning-ssesam fit --config NAME`` and ``compare --config NAME``."""
