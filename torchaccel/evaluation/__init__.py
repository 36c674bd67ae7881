"""Measuring models and variants of them: speed, memory, fidelity and recall, as the command line prints them."""
