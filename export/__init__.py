"""Export side: a run folder in, a checked model bundle out."""
