"""Plans of calibrated methods: what they are, how they are made from a model and text."""
