"""The run's configuration: one YAML file, checked before anything heavy starts. No torch."""
