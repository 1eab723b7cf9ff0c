"""Stages, the executor that runs them, and one file per task."""
