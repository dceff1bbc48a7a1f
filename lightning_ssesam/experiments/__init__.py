"""Comparisons, searches and the other commands: what trains, measures and reports."""
