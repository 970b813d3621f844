"""Studies: many runs compared, with the uncertainty of what they say."""
