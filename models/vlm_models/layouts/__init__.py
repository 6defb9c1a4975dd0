"""Layouts of checkpoint folders, one file each: what config.json and weights look like on disk."""
