"""Datasets as people have them: Hub ids, folders and files, with columns or a template for each."""
