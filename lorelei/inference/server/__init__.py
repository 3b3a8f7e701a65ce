"""What all inference servers share: processes, client, routes, replicas and their engine."""
