"""What a captured transformer graph contains, and the edits that need to know it."""
