"""Which operators of a few rows run together in one kernel: enumeration, legality, choice, rewriting."""
