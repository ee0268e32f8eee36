"""How many distinct sequences a corpus holds, how that number grows, and what two corpora share."""
