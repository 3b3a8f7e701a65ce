"""Process groups, meshes and collectives that train engines share."""
