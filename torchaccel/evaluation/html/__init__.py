"""The HTML report: results documents as one self-contained page of tables, plots and commands."""
