"""Configurations for ``lightning-ssesam fit --config NAME``."""
