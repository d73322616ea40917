"""Objects followed through a clip."""
