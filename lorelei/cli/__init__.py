"""The commands, one file each or one for a group. What is heavy is imported inside a command."""
