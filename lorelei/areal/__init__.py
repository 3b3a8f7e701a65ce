"""AReaL's YAML files, read as they are and translated into ours. No torch."""
