def supports(spec):
    return "none yet"
