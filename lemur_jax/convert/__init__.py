"""Converters between other checkpoint formats and ours, through tables that are read both ways."""
