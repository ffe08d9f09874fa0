"""btrm."""
