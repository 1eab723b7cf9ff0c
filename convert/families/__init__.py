"""The families, one file each: what their checkpoints hold and how their files are told apart."""
