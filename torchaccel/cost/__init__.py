"""What kernels cost on which hardware: device facts, a roofline per candidate, calibration, choice and prediction."""
