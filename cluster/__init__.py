"""Everything that knows Ray: the session, resources, the streaming job, parallel tasks, preflight checks."""
