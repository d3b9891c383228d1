"""Studies, one small file each: which runs answer which question, and what they cost."""
