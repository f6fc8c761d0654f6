"""`fastvlm-bench compare`: time to first token beside that of other libraries, on the same weights."""
