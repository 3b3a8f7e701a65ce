"""What every rollout server has in common: its process, its client, its replicas."""
