"""Planning with generative models of trajectories: diffusions of them, and sequence models."""
