"""The attention operator alone, in several implementations, a file each."""
