"""The user and the cluster: `Runtime`, `Engine`, the executor, the worker loop on Ray Train, the command line."""
