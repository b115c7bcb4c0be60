"""The configuration as typed values: the one table of keys, and what they must satisfy."""
