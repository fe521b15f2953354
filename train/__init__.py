"""Training side: pictures in, a run folder out."""
