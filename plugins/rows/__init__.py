"""CPU layers whose rows do not depend on how many are computed together; README.md has the findings."""
