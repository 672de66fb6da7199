"""Instructions for a run: gathered from data sets in whatever form, images checked, duplicates found."""
