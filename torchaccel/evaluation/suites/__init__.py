"""The attention operator over a fixed set of scenarios, each with a goal, a file each."""
