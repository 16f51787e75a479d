"""What follows from a batch of fits: moderation, discoveries, fractions of variance."""
