"""XKD pretraining: from videos to shards, views, a training step and an evaluated checkpoint."""

__version__ = "0.1.0"
