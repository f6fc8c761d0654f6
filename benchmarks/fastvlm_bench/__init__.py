"""Where every millisecond of the time to first token goes."""
